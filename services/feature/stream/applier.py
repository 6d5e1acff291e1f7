"""Applies the event log to the states of stream views.

One process at a time does it, by a lease that saves work and nothing else: a state that two of them change at once is
written by one, and the other computes its own anew (`services.feature.stream.states`). Work is done in slices of a
millisecond or two between which the event loop serves whoever waits; a process that serves many reads can be told to
leave it to others.

An event that a view has counted is never counted again, however often it is read from the log, as states carry the
positions they have counted. Positions of the log that are known to be counted everywhere are where reading starts.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from services.feature.define.definition import Source, View
from services.feature.define.events import Events, prepared
from services.feature.online.catalogue import PublishedView
from services.feature.online.valkey import CommandError
from services.feature.stream.log import Entry, EventLog, Promise
from services.feature.stream.logged import events_of
from services.feature.stream.states import StateStore, numbered
from services.feature.tiles.kernel import ViewKernel
from services.feature.tiles.state import StateError
from services.resilience.call import Clock
from services.resilience.errors import CallError, Refused, Unavailable

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
_SLICE_S = 0.002
_FEWEST, _MOST = 1, 64  # entities of one slice
_SLICES_AT_ONCE = 4
_MOST_TRIES = 16
_LONGEST_WAIT_S = 1.0  # for events; promises and new generations are looked for as often
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class Catalogue(Protocol):
    """The part of `services.feature.online.store.OnlineStore` that is needed here."""

    async def views(self, timeout_s: float = 1.0) -> list[PublishedView]: ...
    def key_prefix(self, view: str, generation: int = 0) -> str: ...


@dataclass(frozen=True, slots=True)
class StreamView:
    """A view, and what counts for it."""

    view: View
    kernel: ViewKernel


@dataclass(slots=True)
class Target:
    """One generation of a stream view. positions: source -> up to where it has counted."""

    stream: StreamView
    generation: int
    key_prefix: str
    positions: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return numbered(self.stream.view.name, self.generation)


class Lag(NamedTuple):
    """How far a source's states are behind its log.

    events: logged and not yet counted. waiting: entries in the log, counted ones included.
    known_us: of the newest event counted; watermark_us: every event known before it is counted; 0 for none.
    """

    events: int
    waiting: int
    known_us: int
    watermark_us: int


class Gap(RuntimeError):
    """Events are gone from the log that a generation has not counted."""

    def __init__(self, source: str, first: int, end: int) -> None:
        super().__init__(f"source {source!r}: positions {first} to {end - 1} are no longer in its log")


class Applier:
    """Belongs to one event loop."""

    def __init__(
        self,
        streams: Iterable[StreamView],
        catalogue: Catalogue,
        events: EventLog,
        waiting: EventLog,
        states: StateStore,
        *,
        lease_s: float = 3.0,
        batch: int = 512,
        clock: Clock = time.monotonic,
    ) -> None:
        """waiting: the same log as `events` on a connection of its own, where waiting for events holds nobody up.

        lease_s: how long others wait before they take over from one that died. batch: events read at once.
        """
        self._streams = {stream.view.name: stream for stream in streams}
        self._sources: dict[str, Source] = {
            source.name: source for stream in self._streams.values() for source in stream.view.sources
        }
        self._catalogue, self._events, self._waiting, self._states = catalogue, events, waiting, states
        self._lease_s, self._batch, self._clock = lease_s, batch, clock
        self._owner = secrets.token_hex(8)
        self._slice = _MOST // 2
        self._turn = asyncio.Lock()
        self._promises: dict[str, Promise] = {}
        self._told: set[str] = set()
        self.applied = 0
        """Events read and counted, once for every view."""
        self.poisonous = 0
        """Entries that could not be decoded."""
        self.retried = 0
        """States that another applier had changed meanwhile."""
        self.unreadable = 0
        """Times that a state could not be read, so that what happened to its entity was left out."""

    async def run(self) -> None:
        """Applies what comes, whenever the lease is ours, until cancelled."""
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                try:
                    if await self._states.lease(self._owner, self._lease_s, TIMEOUT_S):
                        await self._hold()
                except (CommandError, Refused) as error:  # a full store is nobody else's to tell of
                    self._tell_once("events are not applied", str(error))
                except CallError as error:  # whoever holds the connection told of it
                    log.debug("events are not applied", extra={"reason": str(error)})
                except Exception:  # reads must go on, and whoever looks at the lag will see that events do not
                    log.exception("events are not applied")
                else:
                    pause_s = _FIRST_PAUSE_S
                    await asyncio.sleep(self._lease_s / 3)
                    continue
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            await self._give_lease_back()

    async def catch_up(self, targets: Sequence[Target], until: Mapping[str, int]) -> None:
        """Counts the log into these targets, up to the positions given, whoever has the lease.

        Raises Gap where the log has lost what a target has not counted.
        """
        for source in self._sources.values():
            ours = [target for target in targets if source.name in target.positions]
            while ours and (behind := min(target.positions[source.name] for target in ours)) < until[source.name]:
                read = await self._events.read({source.name: behind}, self._batch, 0, TIMEOUT_S)
                entries = read.get(source.name)
                if not entries or entries[0].position != behind + 1:
                    raise Gap(source.name, behind + 1, entries[0].position if entries else until[source.name] + 1)
                await self._apply(source, entries, ours)

    async def lag(self) -> dict[str, Lag]:
        """Per source of a stream view. Any process may ask, whoever applies."""
        targets = await self._targets()
        found = {}
        for name in self._sources:
            last = await self._events.last_position(name, TIMEOUT_S)
            applied = await self._states.applied(name, TIMEOUT_S)
            counted = [target.positions[name] for target in targets if name in target.positions]
            behind = last - min(counted, default=0)
            waiting = await self._events.length(name, TIMEOUT_S)
            found[name] = Lag(max(0, behind), waiting, applied.known_us, applied.watermark_us)
        return found

    async def _hold(self) -> None:
        """Applies while the lease is ours."""
        log.info("applying events", extra={"views": list(self._streams)})
        wait_s = min(_LONGEST_WAIT_S, self._lease_s / 3)
        targets, looked_at = await self._still_there(await self._targets()), self._clock()
        self._promises.clear()
        while True:
            now = self._clock()
            if now - looked_at >= wait_s:
                if not await self._states.lease(self._owner, self._lease_s, TIMEOUT_S):
                    log.info("another applies events")
                    return
                targets, looked_at = await self._still_there(await self._targets(targets)), now
                for name in self._sources:
                    await self._raise(self._sources[name], targets, 0)
            after = _starts(targets)
            if not after:
                await asyncio.sleep(wait_s)
                continue
            read = await self._waiting.read(after, self._batch, wait_s, TIMEOUT_S)
            for name, entries in read.items():
                await self._apply(self._sources[name], entries, [t for t in targets if name in t.positions])

    async def _targets(self, known: Sequence[Target] = ()) -> list[Target]:
        """What is published of the stream views, with how far it has counted."""
        built = await self._states.built(TIMEOUT_S)
        before = {target.name: target for target in known}
        found: list[Target] = []
        for published in await self._catalogue.views(TIMEOUT_S):
            stream = self._streams.get(published.name)
            if stream is None:
                continue
            name = numbered(published.name, published.generation)
            if published.kind != "state" or built.get(name) != stream.kernel.schema_hash:
                why = "not yet materialised as a stream" if published.kind != "state" else "of another definition"
                self._tell_once("events of a view are not counted", f"{name} is {why}; materialise it")
                continue
            if name not in before:
                prefix = self._catalogue.key_prefix(published.name, published.generation)
                before[name] = await self._target(stream, published.generation, prefix)
            found.append(before[name])
        return found

    async def _still_there(self, targets: Sequence[Target]) -> list[Target]:
        """Without those that have counted more than was ever logged.

        The log was emptied or replaced, and its positions begin again: what comes now would be skipped as counted.
        """
        kept = list(targets)
        for name in self._sources:
            last = await self._events.last_position(name, TIMEOUT_S)
            for target in [target for target in kept if target.positions.get(name, 0) > last]:
                kept.remove(target)
                told = f"{target.name} has counted {name!r} up to {target.positions[name]}, but its log ends at {last}"
                self._tell_once("a log was lost; materialise the view", told)
        return kept

    async def _target(self, stream: StreamView, generation: int, key_prefix: str) -> Target:
        target = Target(stream, generation, key_prefix)
        for source in stream.view.sources:
            applied = await self._states.applied(source.name, TIMEOUT_S)
            target.positions[source.name] = applied.positions.get(target.name, 0)
        return target

    async def _apply(self, source: Source, entries: Sequence[Entry], targets: Sequence[Target]) -> None:
        """Counts them in every target, then says so."""
        if not entries:
            return
        whole = [(entry.position, entry.event) for entry in entries if entry.event is not None]
        if poisonous := len(entries) - len(whole):
            self.poisonous += poisonous
            extra = {"source": source.name, "entries": poisonous, "position": entries[0].position}
            log.error("entries of the log cannot be decoded and are skipped", extra=extra)
        last = entries[-1].position
        given = events_of(source, [event for _, event in whole])
        events, counts = prepared(source, given)
        positions = np.array([position for position, _ in whole], np.int64)[counts]
        counting = []
        for target in targets:
            behind = target.positions[source.name]
            if behind >= last:
                continue
            if entries[0].position > behind + 1:
                self._tell_once(
                    "materialise a view", f"{target.name}: {Gap(source.name, behind + 1, entries[0].position)}"
                )
            new = positions > behind
            if new.any():
                fresh = events if new.all() else events.take(np.flatnonzero(new))
                counting.append(self._count(target, fresh, positions[new]))
        await _all(counting)
        for target in targets:
            target.positions[source.name] = max(last, target.positions[source.name])
        self.applied += len(whole)
        await self._raise(source, targets, int(given.known_us.max()) if len(given) else 0)

    async def _count(self, target: Target, events: Events, positions: NDArray[np.int64]) -> None:
        """Counts events in one target, a few entities at a time."""
        view, kernel = target.stream.view, target.stream.kernel
        wanted = set(kernel.entities(events))
        rows: dict[str, list[int]] = {}
        for row, entity_id in enumerate(events.entities[view.entity]):
            if entity_id in wanted:
                rows.setdefault(entity_id, []).append(row)
        ids = deque(rows)

        async def work() -> None:
            while ids:
                chunk = [ids.popleft() for _ in range(min(self._slice, len(ids)))]
                at = np.array(sorted(row for entity_id in chunk for row in rows[entity_id]), np.intp)
                await self._count_some(target, chunk, events.take(at), positions[at])

        # the store's disk takes longer than the kernel: others are computed while some are written
        await _all(work() for _ in range(_SLICES_AT_ONCE))

    async def _count_some(self, target: Target, ids: list[str], events: Events, positions: NDArray[np.int64]) -> None:
        for _ in range(_MOST_TRIES):
            if not ids:
                return
            keys = [f"{target.key_prefix}{entity_id}}}" for entity_id in ids]
            before = dict(zip(ids, await self._states.fetch(keys, TIMEOUT_S), strict=True))
            try:
                after = await self._applied(target.stream.kernel, before, events, positions)
            except StateError:
                ids, events, positions = self._readable(target, before, events, positions)
                continue
            changed = [entity_id for entity_id in ids if entity_id in after and after[entity_id] != before[entity_id]]
            done = await self._states.swap(
                target.stream.view,
                [f"{target.key_prefix}{entity_id}}}" for entity_id in changed],
                [before[entity_id] for entity_id in changed],
                [after[entity_id] for entity_id in changed],
                TIMEOUT_S,
            )
            if all(done):
                return
            self.retried += len(done) - sum(done)  # those that were set are skipped by their positions
        raise Unavailable(f"others changed states of {target.name} each of {_MOST_TRIES} times that we tried to")

    async def _applied(
        self,
        kernel: ViewKernel,
        states: Mapping[str, bytes | None],
        events: Events,
        positions: NDArray[np.int64],
    ) -> dict[str, bytes]:
        async with self._turn:
            began = time.thread_time()  # not the time in which others had the processor
            after = kernel.apply(states, events, positions)
            self._pace(time.thread_time() - began)
            await asyncio.sleep(0)  # one slice, then whoever waits
        return after

    def _readable(
        self, target: Target, states: Mapping[str, bytes | None], events: Events, positions: NDArray[np.int64]
    ) -> tuple[list[str], Events, NDArray[np.int64]]:
        """What concerns entities whose states can be read.

        The others' stay as they are, so that readers are told that nothing is known of them, until the view is
        materialised anew. To begin again from nothing would be to serve wrong values.
        """
        kernel, good = target.stream.kernel, []
        for entity_id, state in states.items():
            try:
                if state is not None:
                    kernel.check(state)
            except StateError as error:
                self.unreadable += 1
                told = f"{target.name}, entity {entity_id!r}: {error}"
                self._tell_once("a state cannot be read; materialise its view", told)
            else:
                good.append(entity_id)
        column = events.entities[target.stream.view.entity]
        kept = set(good)
        rows = np.array([row for row, entity_id in enumerate(column) if entity_id in kept], np.intp)
        return good, events.take(rows), positions[rows]

    def _pace(self, took_s: float) -> None:
        """So many entities at a time that a slice takes as long as it may."""
        if took_s > _SLICE_S:
            self._slice = max(_FEWEST, self._slice // 2)
        elif took_s < _SLICE_S / 2:
            self._slice = min(_MOST, self._slice + 1)

    async def _raise(self, source: Source, targets: Sequence[Target], known_us: int) -> None:
        """Says how far the targets have counted, and which promise therefore holds."""
        positions = {
            target.name: target.positions[source.name] for target in targets if source.name in target.positions
        }
        if not positions:
            return
        if source.name not in self._promises:
            self._promises[source.name] = await self._events.promise(source.name, TIMEOUT_S)
        promise, watermark_us = self._promises[source.name], 0
        # kept until it holds: under constant load the latest is always a little ahead of us
        if min(positions.values()) >= promise.position:
            watermark_us = promise.watermark_us
            del self._promises[source.name]
        await self._states.raise_applied(source.name, positions, known_us, watermark_us, TIMEOUT_S)

    async def _give_lease_back(self) -> None:
        try:
            await self._states.lease(self._owner, 0, 1.0)
        except CallError as error:
            log.debug("lease not given back", extra={"reason": str(error)})

    def _tell_once(self, what: str, reason: str) -> None:
        if reason not in self._told and len(self._told) < 256:
            self._told.add(reason)
            log.warning(what, extra={"reason": reason})


def _starts(targets: Sequence[Target]) -> dict[str, int]:
    """Per source, the smallest position not yet counted somewhere."""
    after: dict[str, int] = {}
    for target in targets:
        for source, position in target.positions.items():
            after[source] = min(position, after.get(source, position))
    return after


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Returns when all is done. Raises the first thing that went wrong."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
