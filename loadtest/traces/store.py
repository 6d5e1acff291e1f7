"""Spans in one SQLite file: written in batches by the sink, read by whoever tells a trace's story.

The newest spans win: the oldest leave when the file holds more than its cap, or when they are past their keep.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Attributes = dict[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a request's story.

    trace, span, parent: lower-case hexadecimal; parent is empty for a root.
    start_ns: since 1970 UTC. duration_ns: at least 0.
    """

    trace: str
    span: str
    parent: str
    service: str
    instance: str
    name: str
    start_ns: int
    duration_ns: int
    failed: bool = False
    message: str = ""
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One line about a trace: how it started, how long it took from first start to last end, what failed."""

    trace: str
    service: str
    name: str
    start_ns: int
    duration_ns: int
    spans: int
    failed: int


_COLUMNS = "trace, span, parent, service, instance, name, start_ns, duration_ns, failed, message, attributes"
_SCHEMA = f"""
create table if not exists span ({_COLUMNS});
create index if not exists span_of_trace on span (trace);
"""


class TraceStore:
    """Reads and writes one file. One thread at a time."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Raises FileNotFoundError where a reader's file is not there."""
        if not writable and not path.exists():
            raise FileNotFoundError(f"{path}: no traces have been kept here")
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("pragma busy_timeout = 2000")
        if writable:
            self._db.execute("pragma journal_mode = wal")  # readers never wait for the writer
            self._db.execute("pragma synchronous = off")  # losing the last spans in a power cut harms nobody
            self._db.execute("pragma wal_autocheckpoint = 256")
            self._db.executescript(_SCHEMA)

    def __enter__(self) -> TraceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def add(self, spans: Iterable[Span]) -> None:
        """Writes all of them in one transaction."""
        rows = [_row(span) for span in spans]
        self._db.execute("begin")
        try:
            self._db.executemany(f"insert into span values ({', '.join('?' * 11)})", rows)  # noqa: S608
        except BaseException:
            self._db.execute("rollback")
            raise
        self._db.execute("commit")

    def prune(self, *, keep_spans: int, older_than_ns: int) -> int:
        """Deletes all but the newest `keep_spans`, and what started before `older_than_ns`. Returns how many left."""
        before = self._db.total_changes
        self._db.execute("delete from span where rowid <= (select max(rowid) from span) - ?", (keep_spans,))
        self._db.execute("delete from span where start_ns < ?", (older_than_ns,))
        return self._db.total_changes - before

    def newest(self, limit: int = 20) -> list[TraceSummary]:
        """The traces that started last, newest first."""
        found = self._db.execute(
            "select trace, min(start_ns), max(start_ns + duration_ns), count(*), sum(failed)"
            " from span group by trace order by min(start_ns) desc limit ?",
            (limit,),
        ).fetchall()
        return [
            TraceSummary(trace, *self._first_of(trace), start, end - start, count, failed)
            for trace, start, end, count, failed in found
        ]

    def trace(self, prefix: str) -> list[Span]:
        """The spans of the one trace whose id starts with `prefix`, by start; none where there is no such trace.

        Raises ValueError where several traces start like that.
        """
        ids = self._db.execute(
            "select distinct trace from span where trace between ? and ? limit 2", (prefix, prefix + "g")
        ).fetchall()
        if len(ids) > 1:
            raise ValueError(f"several traces start with {prefix!r}; give more of its id")
        if not ids:
            return []
        rows = self._db.execute(f"select {_COLUMNS} from span where trace = ? order by start_ns", ids[0])  # noqa: S608
        return [_span(row) for row in rows]

    def __len__(self) -> int:
        return int(self._db.execute("select count(*) from span").fetchone()[0])

    def _first_of(self, trace: str) -> tuple[str, str]:
        """Service and name of a trace's root, or of what started first where the root is not here."""
        row = self._db.execute(
            "select service, name from span where trace = ? order by parent <> '', start_ns limit 1", (trace,)
        ).fetchone()
        return str(row[0]), str(row[1])


def _row(span: Span) -> Sequence[object]:
    fields = asdict(span)
    return [*list(fields.values())[:-1], json.dumps(fields["attributes"], separators=(",", ":"))]


def _span(row: tuple[Any, ...]) -> Span:
    return Span(*(*row[:8], bool(row[8]), row[9], json.loads(row[10])))
