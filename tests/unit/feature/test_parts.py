from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from services.feature.offline.parts import Parts, PartsError

FACTS = {"views": {"origin": "1f"}, "days": ["2013-01-01", "2013-01-02"]}
TABLE = pa.table({"x": [1, 2]})


def test_what_is_whole_is_not_made_again(tmp_path: Path) -> None:
    parts = Parts.open(str(tmp_path / "out"), FACTS)
    parts.write("day=1/bucket=0", TABLE)
    again = Parts.open(str(tmp_path / "out"), FACTS)
    assert again.missing(["day=1/bucket=0", "day=1/bucket=1"]) == ["day=1/bucket=1"]
    assert pyarrow.parquet.read_table(tmp_path / "out/day=1/bucket=0.parquet")["x"].to_pylist() == [1, 2]


def test_a_part_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    parts = Parts.open(str(tmp_path / "out"), FACTS)
    parts.write("a", TABLE)
    (tmp_path / "out/b.parquet.unfinished").write_bytes(b"PAR1")
    (tmp_path / "out/a.parquet").unlink()
    assert Parts.open(str(tmp_path / "out"), FACTS).missing(["a", "b"]) == ["a", "b"]


def test_parts_made_from_other_facts_are_not_mixed(tmp_path: Path) -> None:
    Parts.open(str(tmp_path / "out"), FACTS).write("a", TABLE)
    with pytest.raises(PartsError, match="days differ"):
        Parts.open(str(tmp_path / "out"), FACTS | {"days": ["2014-01-01", "2014-01-02"]})
    assert Parts.open(str(tmp_path / "out"), FACTS).missing(["a"]) == []


def test_a_restart_removes_the_parts_and_nothing_else(tmp_path: Path) -> None:
    Parts.open(str(tmp_path / "out"), FACTS).write("a", TABLE)
    (tmp_path / "out/notes.txt").write_text("mine")
    parts = Parts.open(str(tmp_path / "out"), FACTS | {"days": []}, restart=True)
    assert parts.missing(["a"]) == ["a"]
    assert not (tmp_path / "out/a.parquet").exists()
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(PartsError, match="is not empty and has no manifest"):
        Parts.open(str(tmp_path), FACTS)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"facts": {}, "rows": {"a": "many"}}'])
def test_a_damaged_manifest_is_refused_until_restarted(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(PartsError, match="cannot be read"):
        Parts.open(str(tmp_path), FACTS)
    assert Parts.open(str(tmp_path), FACTS, restart=True).rows == {}


def test_parts_go_to_any_file_system() -> None:
    parts = Parts.open("memory://parts-test/out", FACTS)
    parts.write("a/b", TABLE)
    assert Parts.open("memory://parts-test/out", FACTS).missing(["a/b"]) == []
