"""The event log, written to Parquet files beside the source's others, so that it can be trimmed.

    tf:<mesh>:archived:<source>    the position up to which the log is in files
    tf:<mesh>:archiving:<source>   "<first>-<last>": the range that is being written, until it is archived

A range is claimed before it is written, and whoever finds a claim writes just that range, to a file that is named after
it: archivers that die or work at once write the same events to the same name, so that no event is there twice. A file
is written beside its name and moved there when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet

from services.feature.define.definition import Source
from services.feature.online.valkey import Commands
from services.feature.stream.log import Entry, EventLog
from services.feature.stream.scripts import Script, run
from services.feature.stream.states import StateStore

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
MOST_EVENTS = 1_000_000
"""Of one file: they are in memory together."""
_READ_AT_ONCE = 4096
_UNFINISHED = ".unfinished"
_NAMED = re.compile(r"log-(?P<source>[a-z][a-z0-9_]*)-(?P<first>\d{16})-(?P<last>\d{16})")

# KEYS: archived, archiving. ARGV: what must be archived, the range to claim. Answers the range that is claimed.
_CLAIM = Script("""
local claimed = redis.call('GET', KEYS[2])
if claimed then return claimed end
if (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1] then return false end
redis.call('SET', KEYS[2], ARGV[2])
return ARGV[2]
""")

# KEYS: archived, archiving. ARGV: the range that was written, its last position.
_DONE = Script("""
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2])
return 1
""")


class ArchiveError(RuntimeError):
    """The log cannot be archived; the message names the source and says why."""


class Range(NamedTuple):
    """Positions, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @classmethod
    def parse(cls, text: str) -> Range:
        first, _, last = text.partition("-")
        return cls(int(first), int(last))


class File(NamedTuple):
    """One file of a source. archived: the positions of the log that it holds; None where it came from elsewhere."""

    path: str
    archived: Range | None


@dataclass(frozen=True, slots=True)
class Archive:
    """folder: what the sources' paths are relative to, a path or the URL of a file system."""

    commands: Commands
    mesh: str
    events: EventLog
    folder: str

    async def archived(self, source: str) -> int:
        """The position up to which the log is in files; 0 for none."""
        return int(await self.commands.call("GET", self._key(source, "archived"), timeout_s=TIMEOUT_S) or 0)

    async def check(self, source: Source) -> None:
        """Raises ArchiveError where files hold positions of which the store does not know that they are archived.

        It was emptied, or another took its place that lacks the latest of it. Its positions begin again, so that to
        go on would be to overwrite files, to count some events twice, and others never.
        """
        # in this order: what is in a file was claimed before, and is no longer claimed only once it is archived
        found = await asyncio.to_thread(files, self.folder, source)
        claimed, archived = await self._claimed(source.name), await self.archived(source.name)
        for _, ranged in found:
            if ranged is not None and ranged.last > archived and ranged != claimed:
                raise ArchiveError(
                    f"source {source.name!r}: a file holds positions {ranged} of its log, but the store has archived "
                    f"{archived} of them, so it lost its log; rename the files log-{source.name}-* to anything else, "
                    "and they count as what came before the log"
                )

    async def write(self, source: Source, least: int = 1, most: int = MOST_EVENTS) -> Range | None:
        """Writes what is logged and not yet archived to one file; which positions, None where there was too little.

        least, most: events of one file. A range that others claimed is finished first, whatever its size.
        Raises ArchiveError, and what the store raises; then nothing is archived, and to try again is safe.
        """
        claimed = await self._claim(source, least, most)
        if claimed is None:
            return None
        entries = await self._entries(source, claimed)
        if entries is None:
            return None
        lost = sum(entry.event is None for entry in entries)
        if lost:
            log.error("entries that cannot be decoded are not archived", extra={"source": source.name, "count": lost})
        await asyncio.to_thread(_write, self.folder, source, claimed, entries)
        await run(self.commands, _DONE, self._keys(source), (str(claimed), claimed.last), TIMEOUT_S)
        log.info("events archived", extra={"source": source.name, "positions": str(claimed)})
        return claimed

    async def trim(self, source: Source, states: StateStore, published: Mapping[str, int], keep: int = 0) -> int:
        """Removes from the log what is archived, and counted by every generation that is read or being built.

        published: view -> its generation; those before it count no more. keep: how many archived events stay all the
        same. Answers how many events were removed.
        """
        position = await self.archived(source.name) - keep
        applied = await states.applied(source.name, TIMEOUT_S)
        for name, counted in applied.positions.items():
            view, _, generation = name.rpartition(":")
            if int(generation) >= published.get(view, 0):
                position = min(position, counted)
        return await self.events.trim(source.name, position, TIMEOUT_S) if position > 0 else 0

    async def _claim(self, source: Source, least: int, most: int) -> Range | None:
        archived = await self.archived(source.name)
        last = min(await self.events.last_position(source.name, TIMEOUT_S), archived + most)
        if (claimed := await self._claimed(source.name)) is not None:
            return claimed
        if last - archived < max(1, least):
            return None
        await self.check(source)
        wanted = Range(archived + 1, last)
        claim = await run(self.commands, _CLAIM, self._keys(source), (archived, str(wanted)), TIMEOUT_S)
        return Range.parse(claim.decode()) if claim is not None else None

    async def _claimed(self, source: str) -> Range | None:
        claim = await self.commands.call("GET", self._key(source, "archiving"), timeout_s=TIMEOUT_S)
        return Range.parse(claim.decode()) if claim is not None else None

    async def _entries(self, source: Source, claimed: Range) -> list[Entry] | None:
        """All of the range; None where another finished it meanwhile."""
        found: list[Entry] = []
        position = claimed.first - 1
        while position < claimed.last:
            most = min(_READ_AT_ONCE, claimed.last - position)
            read = (await self.events.read({source.name: position}, most, 0, TIMEOUT_S)).get(source.name, [])
            if not read or read[0].position != position + 1 or read[-1].position != position + len(read):
                if await self.archived(source.name) >= claimed.last:
                    return None
                raise ArchiveError(f"source {source.name!r}: its log has gaps within positions {claimed}")
            found += read
            position = read[-1].position
        return found

    def _keys(self, source: Source) -> list[str]:
        return [self._key(source.name, "archived"), self._key(source.name, "archiving")]

    def _key(self, source: str, what: str) -> str:
        return f"tf:{self.mesh}:{what}:{source}"


def files(folder: str, source: Source) -> list[File]:
    """The source's files, in order of their names."""
    fs, path = fsspec.core.url_to_fs(folder)
    found = []
    for name in sorted(fs.glob(f"{path}/{source.path}")):
        match = _NAMED.search(name)
        ranged = Range(int(match["first"]), int(match["last"])) if match else None
        if match and match["source"] != source.name:
            continue  # of another source that shares the folder: none of it counts here
        found.append(File(name, ranged))
    return found


def path_of(source: Source, archived: Range) -> str:
    """Where a range goes, relative to the folder, so that the source's pattern matches it. Raises ArchiveError."""
    if "*" not in source.path or re.search(r"[?\[\]{}]", source.path):
        raise ArchiveError(f"source {source.name!r}: to be archived its path must have a *, got {source.path!r}")
    name = f"log-{source.name}-{archived.first:016d}-{archived.last:016d}"
    return re.sub(r"\*+", name, source.path)


def _write(folder: str, source: Source, archived: Range, entries: Sequence[Entry]) -> None:
    fs, path = fsspec.core.url_to_fs(folder)
    target = f"{path}/{path_of(source, archived)}"
    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    ours = f"{target}.{secrets.token_hex(4)}{_UNFINISHED}"
    with fs.open(ours, "wb") as file:
        pa.parquet.write_table(_like(files(folder, source), fs, table_of(source, entries)), file, compression="zstd")
    try:
        fs.mv(ours, target)
    except FileNotFoundError:
        if not fs.exists(target):  # else another wrote the same, and took ours for what somebody left who died
            raise
    for left in fs.glob(f"{target}.*{_UNFINISHED}"):
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(left)


def _like(others: Sequence[File], fs: Any, table: pa.Table) -> pa.Table:
    """With every column that the source's other files have, null where the log does not have it.

    Other sources may read the same files, and what has none of their times is none of their events.
    """
    elsewhere = next((file.path for file in others if file.archived is None), None)
    if elsewhere is None:
        return table
    with fs.open(elsewhere, "rb") as file:
        schema = pa.parquet.read_schema(file)
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field.name, pa.nulls(len(table), field.type))
    return table


def table_of(source: Source, entries: Sequence[Entry]) -> pa.Table:
    """The events with the source's own names of columns. Entries that cannot be decoded are left out."""
    events = [entry.event for entry in entries if entry.event is not None]
    columns = {
        source.event_us: pa.array([event.event_us for event in events], pa.int64()),
        source.known_us: pa.array([event.known_us for event in events], pa.int64()),
        source.sequence: pa.array([event.sequence for event in events], pa.int64()),
    }
    for name in source.entities:
        columns[name] = pa.array([event.entities.get(name) for event in events], pa.string())
    for name in source.labels:
        columns[name] = pa.array([event.labels.get(name) for event in events], pa.string())
    for name in source.plain:
        columns[name] = pa.array([event.values.get(name) for event in events], pa.float64())
    return pa.table(columns)
