from pathlib import Path

import numpy as np
import pytest

from services.feature.check.served import Served, ServedLog, read


def keep(log: ServedLog, n: int = 2, view: str = "origin") -> None:
    ids = [f"e{i}" for i in range(n)]
    log.keep(view, 7, ids, 99, np.arange(n, dtype="<i8").tobytes(), np.ones((n, 3), "<f4").tobytes(), b"\x01" * 3 * n)


def test_every_hundredth_answer_is_taken_where_the_share_is_one_percent(tmp_path: Path) -> None:
    log = ServedLog(tmp_path, 0.01, "feature-0")
    assert sum(log.takes_this() for _ in range(1000)) == 10


def test_what_was_kept_is_read_back(tmp_path: Path) -> None:
    log = ServedLog(tmp_path / "served", 1.0, "feature-0")
    keep(log)
    log.flush()
    keep(log, view="dest")
    log.flush()
    assert [record.view for record in read(tmp_path / "served")] == ["origin", "dest"]
    first = next(read(tmp_path / "served"))
    assert first == Served("origin", 7, ["e0", "e1"], [99, 99], first.event_us, first.values, b"\x01" * 6)
    assert np.frombuffer(first.values, "<f4").tolist() == [1.0] * 6


def test_only_the_first_rows_of_a_large_answer_are_kept(tmp_path: Path) -> None:
    log = ServedLog(tmp_path, 1.0, "feature-0")
    keep(log, n=1000)
    log.flush()
    (record,) = read(tmp_path)
    assert len(record.entity_ids) == len(record.as_of_us) == len(record.event_us) // 8 == 64
    assert len(record.status) == 64 * 3


def test_what_a_crash_cut_off_ends_the_file_and_no_more(tmp_path: Path) -> None:
    log = ServedLog(tmp_path, 1.0, "feature-0")
    keep(log)
    keep(log)
    log.flush()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert len(list(read(tmp_path))) == 1


def test_a_disk_that_cannot_be_written_costs_the_sample_only(tmp_path: Path) -> None:
    (tmp_path / "served").write_text("a file where the folder should be")
    log = ServedLog(tmp_path / "served", 1.0, "feature-0")
    keep(log)
    log.flush()
    assert log.dropped == 1


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    log = ServedLog(tmp_path, 1.0, "feature-0")
    for _ in range(2000):
        keep(log)
    assert log.dropped == 2000 - 1024


def test_the_oldest_files_make_room(tmp_path: Path) -> None:
    (tmp_path / "1-feature-0.served").write_bytes(b"x" * 1000)
    (tmp_path / "2-feature-0.served").write_bytes(b"x" * 1000)
    log = ServedLog(tmp_path, 1.0, "feature-0", max_bytes=1500)
    keep(log)
    log.flush()
    names = {file.name for file in tmp_path.iterdir()}
    assert "1-feature-0.served" not in names
    assert "2-feature-0.served" in names


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_must_be_one(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0"):
        ServedLog(tmp_path, share, "feature-0")
