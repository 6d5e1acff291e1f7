"""Builds a generation of a stream view: from files as far as the log is archived, then from the log.

The files of a source are what came before the log, counted where it was known before a moment, and what the archive
wrote of the log, counted whatever its time. A generation that is being built says so from the start: what it has not
counted is not trimmed from the log. It is published when it has counted what was in the log when its files were done;
whoever applies events goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import duckdb
import fsspec
import pyarrow as pa

from services.feature.define.definition import Source, View
from services.feature.define.events import from_arrow, prepare
from services.feature.online.store import OnlineStore
from services.feature.online.table import Table
from services.feature.stream.applier import Applier, Gap, StreamView, Target
from services.feature.stream.archive import Archive, File, files
from services.feature.stream.log import MAX_US
from services.feature.stream.states import StateStore, numbered
from services.feature.tiles.kernel import ViewKernel
from services.resilience.errors import CallError

TIMEOUT_S = 10.0
_LOAD_TIMEOUT_S = 60.0
_ROWS_AT_ONCE = 65_536
_EVENTS_PER_BUCKET = 2_000_000
_STATES_PER_LOAD = 256
_MOST_BUCKETS = 4096


class Built(NamedTuple):
    """entities: that the files told of. events: counted from files. positions: source -> counted from its log.

    overtaken: one that was begun later was published meanwhile, and ours is gone.
    """

    generation: int
    entities: int
    events: int
    positions: Mapping[str, int]
    overtaken: bool = False


@dataclass(frozen=True, slots=True)
class Builder:
    """folder: where the sources' files are, a path or the URL of a file system.

    threads, memory_mb: what the engine that reads them may use.
    """

    folder: str
    archive: Archive
    store: OnlineStore
    table: Table
    states: StateStore
    threads: int = 2
    memory_mb: int = 1024

    async def build(
        self,
        view: View,
        before_us: int = MAX_US,
        progress: Callable[[str, float], None] = lambda _what, _share: None,
    ) -> Built:
        """Builds and publishes.

        before_us: of the files that are not of the archive, events known before this moment count.
        Raises Gap where the log lost events before they were archived, what the archive raises, and what the store
        raises; then nothing is published, and to try again is safe.
        """
        if not view.stream:
            raise ValueError(f"view {view.name!r} is not maintained by stream")
        kernel, schema = ViewKernel(view), view.schema()
        generation = await self.store.begin(schema)
        name = numbered(view.name, generation)
        try:
            positions = await self._hold_log(view, name)
            for source in view.sources:
                await self.archive.check(source)
            await self._check_log(positions)
            counted = await self._load(view, kernel, generation, positions, before_us, progress)
            target = Target(StreamView(view, kernel), generation, self.store.key_prefix(view.name, generation))
            target.positions |= positions
            await self._catch_up(target, progress)
            await self.states.set_built(view.name, generation, kernel.schema_hash, TIMEOUT_S)
            watermark_us = max(counted.newest_us, 1)
            numbers = {view.name: generation}
            done = await self.store.publish(
                [schema], watermark_us, {view.name: counted.entities}, numbers, kind="state", even_if_older=True
            )
        except BaseException:
            await self._give_up(view, generation)
            raise
        overtaken = view.name in done.overtaken
        if overtaken:
            await self.states.forget(view, [generation], TIMEOUT_S)
        else:
            await self._forget_those_before(view, generation)
        progress("published", 1.0)
        return Built(generation, counted.entities, counted.events, dict(target.positions), overtaken)

    async def _give_up(self, view: View, generation: int) -> None:
        """Frees what a generation that will not be published took, as far as the store lets us."""
        with contextlib.suppress(CallError, ValueError):  # then a later build removes it, or it was published after all
            await self.store.retire(view.name, generation, 0.0)
            await self.states.forget(view, [generation], TIMEOUT_S)

    async def _hold_log(self, view: View, generation: str) -> dict[str, int]:
        """From now on the log keeps what is not archived; up to where it is."""
        positions: dict[str, int] = {}
        for source in view.sources:
            await self.states.raise_applied(source.name, {generation: 0}, 0, 0, TIMEOUT_S)
            # asked only now: what was trimmed before somebody saw that we hold the log was archived by then
            positions[source.name] = await self.archive.archived(source.name)
            await self.states.raise_applied(source.name, {generation: positions[source.name]}, 0, 0, TIMEOUT_S)
        return positions

    async def _check_log(self, positions: Mapping[str, int]) -> None:
        for source, position in positions.items():
            first = await self.archive.events.first_position(source, TIMEOUT_S)
            last = await self.archive.events.last_position(source, TIMEOUT_S)
            if (first or last + 1) > position + 1:
                raise Gap(source, position + 1, first or last + 1)
            if last < position:  # positions begin again, so that what comes would be taken for what is archived
                raise Gap(source, position + 1, last + 1)

    async def _load(
        self,
        view: View,
        kernel: ViewKernel,
        generation: int,
        positions: Mapping[str, int],
        before_us: int,
        progress: Callable[[str, float], None],
    ) -> _Counted:
        reader = await asyncio.to_thread(
            _Reader.of, self.folder, view, positions, before_us, self.threads, self.memory_mb
        )
        prefix = self.store.key_prefix(view.name, generation)
        counted = _Counted()
        for bucket in range(reader.buckets):
            progress("files", bucket / reader.buckets)
            states = await asyncio.to_thread(reader.states, kernel, bucket, counted)
            items = iter(states.items())
            while part := list(itertools.islice(items, _STATES_PER_LOAD)):
                keys = [f"{prefix}{entity_id}}}" for entity_id, _ in part]
                rows = [kernel.at_positions(state, positions) for _, state in part]
                await self.table.load(keys, rows, _LOAD_TIMEOUT_S)
        return counted

    async def _catch_up(self, target: Target, progress: Callable[[str, float], None]) -> None:
        progress("log", 0.0)
        events = self.archive.events
        applier = Applier([target.stream], self.store, events, events, self.states)
        until = {source: await events.last_position(source, TIMEOUT_S) for source in target.positions}
        await applier.catch_up([target], until)

    async def _forget_those_before(self, view: View, generation: int) -> None:
        names = set(await self.states.built(TIMEOUT_S))
        for source in view.sources:
            names |= (await self.states.applied(source.name, TIMEOUT_S)).positions.keys()
        numbers = {int(number) for name, _, number in (one.rpartition(":") for one in names) if name == view.name}
        await self.states.forget(view, [number for number in numbers if number < generation], TIMEOUT_S)


@dataclass(slots=True)
class _Counted:
    """newest_us: the latest known_us among the events."""

    entities: int = 0
    events: int = 0
    newest_us: int = 0


@dataclass(frozen=True, slots=True)
class _Reader:
    """A view's events at rest, an entity's all in one bucket. history, archived: paths per source."""

    view: View
    history: Mapping[str, Sequence[str]]
    archived: Mapping[str, Sequence[str]]
    before_us: int
    buckets: int
    folder: str
    config: Mapping[str, Any]

    @classmethod
    def of(
        cls, folder: str, view: View, positions: Mapping[str, int], before_us: int, threads: int, memory_mb: int
    ) -> _Reader:
        history: dict[str, list[str]] = {}
        archived: dict[str, list[str]] = {}
        for source in view.sources:
            found = files(folder, source)
            history[source.name] = [file.path for file in found if file.archived is None]
            archived[source.name] = [file.path for file in found if _counts(file, positions[source.name])]
        config: dict[str, Any] = {
            "threads": threads,
            "memory_limit": f"{memory_mb}MB",
            "preserve_insertion_order": "false",
        }
        reader = cls(view, history, archived, before_us, 1, folder, config)
        buckets = min(_MOST_BUCKETS, 1 + reader._count() // _EVENTS_PER_BUCKET)
        return cls(view, history, archived, before_us, buckets, folder, config)

    def states(self, kernel: ViewKernel, bucket: int, counted: _Counted) -> dict[str, bytes]:
        """The state of every entity in the bucket."""
        states: dict[str, bytes | None] = {}
        for source in self.view.sources:
            for table in self._tables(source, bucket):
                events = prepare(source, from_arrow(source, table))
                if not len(events):
                    continue
                for entity_id in kernel.entities(events):
                    states.setdefault(entity_id, None)
                states.update(kernel.apply(states, events))
                counted.events += len(events)
                counted.newest_us = max(counted.newest_us, int(events.known_us.max()))
        found = {entity_id: state for entity_id, state in states.items() if state is not None}
        counted.entities += len(found)
        return found

    def _tables(self, source: Source, bucket: int) -> Iterator[pa.Table]:
        times = (source.event_us, source.known_us, source.sequence)
        names = list(dict.fromkeys((*times, *source.entities, *source.labels, *source.plain)))
        entity = self.view.entity
        mine = f"{entity} IS NOT NULL AND hash(CAST({entity} AS VARCHAR)) % {self.buckets} = {bucket}"
        limits = ((self.history, f"AND {source.known_us} < {int(self.before_us)}"), (self.archived, ""))
        with self._connect() as con:
            for paths, limit in limits:
                if paths[source.name]:
                    relation = _relation(paths[source.name])
                    held = set(con.sql(f"FROM {relation}").columns)
                    columns = ", ".join(name if name in held else f"NULL AS {name}" for name in names)
                    query = f"SELECT {columns} FROM {relation} WHERE {mine} {limit}"  # noqa: S608 - names are checked
                    for batch in con.sql(query).to_arrow_reader(_ROWS_AT_ONCE):
                        yield pa.Table.from_batches([batch])

    def _count(self) -> int:
        """Events in all files, whether they count or not."""
        total: int = 0
        with self._connect() as con:
            for source in self.view.sources:
                if paths := [*self.history[source.name], *self.archived[source.name]]:
                    ((found,),) = con.sql(f"SELECT count(*) FROM {_relation(paths)}").fetchall()  # noqa: S608
                    total += found
        return total

    def _connect(self) -> duckdb.DuckDBPyConnection:
        con = duckdb.connect(config=dict(self.config))
        fs, _ = fsspec.core.url_to_fs(self.folder)
        if "file" not in fs.protocol:
            con.register_filesystem(fs)
        return con


def _counts(file: File, position: int) -> bool:
    return file.archived is not None and file.archived.last <= position


def _relation(paths: Sequence[str]) -> str:
    listed = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    return f"read_parquet([{listed}], union_by_name = true, hive_types_autocast = false)"
