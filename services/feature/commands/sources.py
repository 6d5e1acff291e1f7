"""Whether the files of the sources are there, with the columns that the definitions speak of.

Only the footers of files are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet

from services.feature.define.definition import Source

_READS_AT_ONCE = 16  # footers are small, and of an object store each costs a round trip

Progress = Callable[[int, int], None]
"""Told the files that are done, and all of them."""


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """column: empty where it is about the whole file; file: a glob where there is none."""

    source: str
    file: str
    column: str
    problem: str

    def __str__(self) -> str:
        where = f", column {self.column!r}" if self.column else ""
        return f"source {self.source!r}: {self.file}{where}: {self.problem}"


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """What a source has at rest. rows, bytes: of all its files, bytes as they are stored."""

    source: str
    files: int
    rows: int
    bytes: int


def examine(
    folder: str,
    sources: Iterable[Source],
    streamed: Collection[str] = (),
    progress: Progress = lambda _done, _all: None,
) -> tuple[list[SourceFiles], list[SourceProblem]]:
    """What there is of each source, and everything that is wrong with it.

    folder: what the sources' paths are relative to, a path or the URL of a file system.
    streamed: sources that need no file, as their events come by stream.
    """
    fs, root = fsspec.core.url_to_fs(folder)
    paths = {source: sorted(map(str, fs.glob(f"{root.rstrip('/')}/{source.path}"))) for source in sources}
    total, done = sum(map(len, paths.values())), 0
    found: list[SourceFiles] = []
    problems: list[SourceProblem] = []
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for source, files in paths.items():
            if not files and source.name not in streamed:
                problems.append(SourceProblem(source.name, f"{folder.rstrip('/')}/{source.path}", "", "no such file"))
            whole: dict[str, _Footer] = {}
            for path, footer in zip(files, pool.map(lambda path: _footer(fs, path), files), strict=True):
                done += 1
                progress(done, total)
                if isinstance(footer, str):
                    problems.append(SourceProblem(source.name, path, "", footer))
                else:
                    whole[path] = footer
            rows, size = sum(one.rows for one in whole.values()), sum(one.bytes for one in whole.values())
            found.append(SourceFiles(source.name, len(files), rows, size))
            problems += _wrong(source, whole)
    return found, problems


class _Footer(NamedTuple):
    schema: pa.Schema
    rows: int
    bytes: int


def _footer(fs: Any, path: str) -> _Footer | str:
    """Or what is wrong with the file."""
    try:
        with fs.open(path, "rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            return _Footer(parquet.schema_arrow, parquet.metadata.num_rows, int(fs.size(path)))
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read as Parquet: {error}"


def _wrong(source: Source, files: Mapping[str, _Footer]) -> Iterator[SourceProblem]:
    """A column that some files lack is null there, unless it orders the events."""
    times = dict.fromkeys((source.known_us, source.event_us, source.sequence))
    texts = dict.fromkeys((*source.entities, *source.labels))
    wanted: tuple[tuple[Iterable[str], str, Callable[[pa.DataType], bool], bool], ...] = (
        (times, "an integer", _is_whole, True),
        (texts, "text", _is_text, False),
        (dict.fromkeys(source.plain), "a number", _is_number, False),
    )
    for names, kind, fits, always in wanted:
        for name in names:
            having = {path: file.schema.field(name).type for path, file in files.items() if name in file.schema.names}
            # names of folders such as day=2013-01-01 are columns too
            lacking = [path for path in files if path not in having and f"/{name}=" not in path]
            if lacking and (always or len(lacking) == len(files)):
                there = ", ".join(files[lacking[0]].schema.names)
                yield SourceProblem(source.name, lacking[0], name, f"there is no such column; there are: {there}")
            for path, found in having.items():
                if not fits(found):
                    yield SourceProblem(source.name, path, name, f"must be {kind}, got {found}")


def _is_whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    of = pa.types
    return bool(of.is_integer(kind) or of.is_floating(kind) or of.is_decimal(kind) or of.is_boolean(kind))
