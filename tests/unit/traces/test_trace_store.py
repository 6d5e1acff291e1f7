from pathlib import Path

import pytest

from loadtest.traces.store import Span, TraceStore


def span(trace: str, name: str, start_ns: int, parent: str = "", *, failed: bool = False) -> Span:
    return Span(trace, f"{trace}-{name}", parent, "router", "router-0", name, start_ns, 10, failed, "why" * failed,
                {"n": 1, "share": 0.5, "ok": True, "tier": "full"})  # fmt: skip


def test_what_was_written_is_read_back_by_a_prefix_of_the_trace_s_id(tmp_path: Path) -> None:
    stored = [span("abc1", "a", 1), span("abc1", "b", 2, "abc1-a", failed=True)]
    with TraceStore(tmp_path / "t.db", writable=True) as store:
        store.add([*stored, span("abd2", "c", 3)])
    with TraceStore(tmp_path / "t.db") as store:
        assert store.trace("abc") == stored
        assert store.trace("f") == []


def test_a_prefix_that_fits_several_traces_is_refused(tmp_path: Path) -> None:
    with TraceStore(tmp_path / "t.db", writable=True) as store:
        store.add([span("abc1", "a", 1), span("abd2", "b", 2)])
        with pytest.raises(ValueError, match="several traces start with 'ab'"):
            store.trace("ab")


def test_a_summary_tells_root_length_and_failures_newest_first(tmp_path: Path) -> None:
    with TraceStore(tmp_path / "t.db", writable=True) as store:
        store.add([span("old", "root", 100), span("new", "child", 205, "new-root", failed=True)])
        store.add([span("new", "root", 200)])
        first, second = store.newest()
    assert (first.trace, first.name, first.duration_ns, first.spans, first.failed) == ("new", "root", 15, 2, 1)
    assert second.trace == "old"


def test_the_oldest_spans_leave_beyond_the_cap_and_beyond_their_age(tmp_path: Path) -> None:
    with TraceStore(tmp_path / "t.db", writable=True) as store:
        store.add([span("t", str(i), i) for i in range(10)])
        assert store.prune(keep_spans=6, older_than_ns=0) == 4
        assert store.prune(keep_spans=6, older_than_ns=7) == 3
        assert [s.name for s in store.trace("t")] == ["7", "8", "9"]


def test_a_reader_of_no_file_is_told_which(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"t\.db"):
        TraceStore(tmp_path / "t.db")
    assert not (tmp_path / "t.db").exists()
