"""WriteEvents: protobuf in, events in the log, answers once they are durable.

A request is checked whole before any of it counts. Whatever goes wrong ends the stream, after the answers to what came
before: a producer that went on behind a hole would be told of sequence numbers whose predecessors are lost.

Requests of all streams that arrive while an append is under way travel together in the next one, per source. A stream
reads a few requests ahead; further ones wait in their connection.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from services.feature.define.definition import Source
from services.feature.stream.log import MAX_SEQUENCE, MAX_US, Appended, EventLog, Group, LogFull, Logged
from services.mesh.context import caller_of
from services.mesh.errors import ending_of
from services.mesh.serve import unreadable
from services.resilience.call import Call, Caller, Clock
from services.resilience.coalesce import Coalescer, Limits
from services.resilience.errors import (
    BadInput,
    CallError,
    DeadlineExceeded,
    Reason,
    Refused,
    Unavailable,
    Violation,
)
from tenfold.feature.v1 import feature_pb2 as pb

MAX_TEXT_BYTES = 256  # of an id or a label
_READ_AHEAD = 16  # requests of one stream
_MOST_VIOLATIONS = 8
_MOST_SHOWN = 40
_FULL_RETRY_S = 1.0
_DURABLE_FOR_S = 5.0  # how long a store is believed to be as durable as it said
# one append at a time keeps the order in which requests came
_BATCHES = Limits(max_batch=64, max_in_flight=1, max_waiting=1024)

Answer = pb.WriteEventsResponse


@dataclass(frozen=True, slots=True)
class IngestLimits:
    """max_events: of one request. max_ahead_us: how far known_us may be in the future of our clock; negative for any.

    timeout_s: of one append. batches: how requests share appends.
    """

    max_events: int = 1024
    max_ahead_us: int = 300_000_000
    timeout_s: float = 2.0
    batches: Limits = _BATCHES


class _Pending(NamedTuple):
    """A request whose answer is awaited. sequence: the largest of its events, 0 where it has none."""

    source: str
    sequence: int
    appended: asyncio.Future[Appended]


class Ingest:
    """Takes the events of every source. Belongs to one event loop."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        log: EventLog,
        check_store: Callable[[], Awaitable[None]],
        limits: IngestLimits = IngestLimits(),
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        clock: Clock = time.monotonic,
    ) -> None:
        """check_store: raises NotDurable where the store would lose what it acknowledges.

        now_us: microseconds since 1970 UTC.
        """
        self._sources, self._log, self._limits, self._now_us = sources, log, limits, now_us
        self._check_store, self._clock, self._durable_until = check_store, clock, -float("inf")
        self._appends = {name: self._coalescer(name) for name in sources}

    async def serve(self, requests: AsyncIterator[pb.WriteEventsRequest], context: Any) -> None:
        """Answers one stream, until its end or the first thing that goes wrong."""
        pending: asyncio.Queue[_Pending | None] = asyncio.Queue(_READ_AHEAD)
        reader = asyncio.create_task(self._read(requests, caller_of(context), pending))
        try:
            while (request := await pending.get()) is not None:
                appended = await request.appended
                answer = Answer(source=request.source, acknowledged_sequence=request.sequence)
                answer.accepted, answer.duplicates = appended
                await context.write(answer)
        except CallError as error:
            ending = ending_of(error)
        else:
            return
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            while not pending.empty():
                _forget(pending.get_nowait())
        await context.abort(ending.code, ending.message, ending.trailers)

    async def _read(
        self, requests: AsyncIterator[pb.WriteEventsRequest], caller: Caller, pending: asyncio.Queue[_Pending | None]
    ) -> None:
        try:
            async for request in requests:
                group = read_request(request, self._sources, self._limits, self._now_us())
                appended = self._appends[request.source].submit(Call(group, caller))
                largest = max((event.sequence for event in group.events), default=0)
                waiting = _Pending(request.source, largest, appended)
                try:
                    await pending.put(waiting)
                except asyncio.CancelledError:
                    _forget(waiting)
                    raise
        except Exception as error:  # noqa: BLE001 - whoever awaits the next answer must hear of it, whatever it was
            failed: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
            failed.set_exception(unreadable(error) if isinstance(error, DecodeError) else error)
            await pending.put(_Pending("", 0, failed))
        else:
            await pending.put(None)

    def _coalescer(self, source: str) -> Coalescer[Group, Appended]:
        def append(batch: Sequence[Call[Group]]) -> Awaitable[Sequence[Appended | Exception]]:
            return self._append(source, [call.request for call in batch])

        return Coalescer(append, self._limits.batches)

    async def _append(self, source: str, groups: Sequence[Group]) -> Sequence[Appended | Exception]:
        try:
            if self._clock() >= self._durable_until:
                await self._check_store()
                self._durable_until = self._clock() + _DURABLE_FOR_S
            answers = await self._log.append(source, groups, self._limits.timeout_s)
        except DeadlineExceeded as error:  # ours, not the caller's
            raise Unavailable(str(error)) from error
        except Unavailable:
            self._durable_until = -float("inf")  # whatever comes back may be another store
            raise
        return [_refusal(answer) if isinstance(answer, LogFull) else answer for answer in answers]


def _refusal(full: LogFull) -> Refused:
    return Refused(Reason.QUEUE_FULL, str(full), _FULL_RETRY_S)


def _forget(request: _Pending | None) -> None:
    """Nobody waits for it any more; an append that is under way goes on."""
    if request is not None and not request.appended.cancel() and not request.appended.cancelled():
        request.appended.exception()


def read_request(
    request: pb.WriteEventsRequest, sources: Mapping[str, Source], limits: IngestLimits, now_us: int
) -> Group:
    """The events of one request. Raises BadInput naming every field that is wrong, up to a few."""
    source = sources.get(request.source)
    if source is None:
        told = f"must be one of {', '.join(sorted(sources)) or 'none'}, got {_shown(request.source)}"
        raise BadInput(Violation("source", told))
    if len(request.events) > limits.max_events:
        told = f"must hold at most {limits.max_events} events, got {len(request.events)}"
        raise BadInput(Violation("events", told))
    latest_us = MAX_US if limits.max_ahead_us < 0 else min(MAX_US, now_us + limits.max_ahead_us)
    checks = _Checks(source, latest_us)
    found = list(itertools.islice(_violations(request, checks), _MOST_VIOLATIONS))
    if found:
        raise BadInput(*found)
    events = [
        Logged(e.sequence, e.event_us, e.known_us, dict(e.entities), dict(e.labels), dict(e.values))
        for e in request.events
    ]
    return Group(events, request.watermark_us)


def _violations(request: pb.WriteEventsRequest, checks: _Checks) -> Iterator[Violation]:
    if not 0 <= request.watermark_us <= checks.latest_us:
        told = f"must be 0 or up to {checks.latest_us} microseconds since 1970, got {request.watermark_us}"
        yield Violation("watermark_us", told)
    for i, event in enumerate(request.events):
        for field, told in checks.problems(event):
            yield Violation(f"events[{i}].{field}", told)


class _Checks:
    """What an event of one source may be."""

    def __init__(self, source: Source, latest_us: int) -> None:
        self.latest_us = latest_us
        self._name = source.name
        self._entities, self._labels = frozenset(source.entities), frozenset(source.labels)
        self._values = frozenset(source.plain)

    def problems(self, event: pb.Event) -> Iterator[tuple[str, str]]:
        """Each with the field that has it."""
        if not 1 <= event.sequence <= MAX_SEQUENCE:
            yield "sequence", f"must be 1 to 2^63 - 1, got {event.sequence}"
        if not 1 <= event.event_us <= MAX_US:
            yield "event_us", f"must be 1 to 2^53 microseconds since 1970, got {event.event_us}"
        if not event.event_us <= event.known_us:
            yield "known_us", f"must not be before event_us {event.event_us}, got {event.known_us}"
        elif event.known_us > self.latest_us:
            yield "known_us", f"must be at most {self.latest_us}, not far in the server's future, got {event.known_us}"
        if not event.entities:
            yield "entities", f"must have at least one of {', '.join(sorted(self._entities))}, got none"
        yield from self._unknown("entities", event.entities, self._entities)
        yield from self._unknown("labels", event.labels, self._labels)
        yield from self._unknown("values", event.values, self._values)
        yield from _lengths("entities", event.entities, 1)
        yield from _lengths("labels", event.labels, 0)

    def _unknown(self, field: str, given: Mapping[str, Any], allowed: frozenset[str]) -> Iterator[tuple[str, str]]:
        if not given.keys() <= allowed:
            unknown = min(given.keys() - allowed)
            told = f"source {self._name!r} has {', '.join(sorted(allowed)) or 'none'}, got {_shown(unknown)}"
            yield field, told


def _lengths(field: str, texts: Mapping[str, str], least: int) -> Iterator[tuple[str, str]]:
    for name, text in texts.items():
        if not least <= len(text) * 4 <= MAX_TEXT_BYTES and not least <= len(text.encode()) <= MAX_TEXT_BYTES:
            told = f"must have {least} to {MAX_TEXT_BYTES} bytes of UTF-8, got {len(text.encode())}: {_shown(text)}"
            yield f"{field}[{_shown(name)}]", told


def _shown(text: str) -> str:
    return repr(text[:_MOST_SHOWN])
