"""GetFeatures and DescribeViews: protobuf in, rows of the online store out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

import grpc

from services.feature.check.served import ServedLog
from services.feature.online.cache import RowCache
from services.feature.online.packed import Rows, SchemaChanged
from services.feature.online.store import MAX_ID_BYTES, OnlineStore, PublishedView
from services.feature.online.table import PartlyUnavailable
from services.feature.onrequest import RequestViews
from services.feature.registry import Plan, Registry, row_layout
from services.feature.settings import FeatureSettings
from services.feature.stream.streams import Streams
from services.mesh import attributes
from services.mesh.channels import MAX_MESSAGE_BYTES
from services.mesh.serve import unary
from services.mesh.telemetry import NO_TRACING, Tracing
from services.resilience.call import Call
from services.resilience.coalesce import Coalescer
from services.resilience.errors import BadInput, CallError, NotFound, Violation
from tenfold.feature.v1 import feature_pb2 as pb
from tenfold.feature.v1 import feature_pb2_grpc

log = logging.getLogger(__name__)

NAME = "tenfold.feature.v1.FeatureService"
_READY_PING_S = 1.0
_READY_PAUSE_S = 0.1
_MAX_VIEWS = 256  # of one request
# details travel as a trailer, and trailers are small
_MOST_VIOLATIONS = 8
_MOST_SHOWN = 40
_SURELY_SHORT = MAX_ID_BYTES // 4  # characters of at most 4 bytes each

Keys = list[str]
StoredRows = list[bytes | None]


class Wanted(NamedTuple):
    """The rows that one request wants of one view. as_of_us: empty for now, else one per entity."""

    view: str
    entity_ids: list[str]
    as_of_us: list[int]


class FeatureService(feature_pb2_grpc.FeatureServiceServicer):
    """Reads the online store for its callers; concurrent calls share one MGET.

    Health stays SERVING while the store is away: every replica reads the same store, so turning callers from one to
    the other helps nobody, calls fail at once with UNAVAILABLE, and the first call after the store is back succeeds
    without waiting for a health check to notice.
    """

    def __init__(
        self,
        store: OnlineStore,
        settings: FeatureSettings,
        tracing: Tracing = NO_TRACING,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        cache: RowCache | None = None,
        streams: Streams | None = None,
        request_views: RequestViews | None = None,
        served: ServedLog | None = None,
    ) -> None:
        """now_us: microseconds since 1970 UTC, for calls that do not say as of when.

        cache: in front of the store's rows, and told of its changes; None to read every row from the store.
        streams: of the views that are maintained by stream; None where there are none.
        request_views: that are worked out while they are asked for. served: keeps a sample of the answers.
        """
        self.tracing = tracing
        self.unreadable_rows = 0
        self._store, self._settings, self._now_us = store, settings, now_us
        self._cache = cache
        self._streams = streams
        self._request_views, self._served = request_views or RequestViews(None), served
        layout_of = streams.layout_of if streams is not None else row_layout
        self._registry = Registry(self._read_views, store.key_prefix, layout_of=layout_of)
        self.reads: Coalescer[Keys, StoredRows] = Coalescer(self._read, settings.limits())
        self._damaged_views: set[str] = set()

    async def ready(self) -> None:
        """Returns when the store answers; it may still be empty."""
        while True:
            try:
                await self._store.ping(_READY_PING_S)
                if self._streams is not None:
                    await self._streams.ready(_READY_PING_S)
                await self._registry.refresh()
            except CallError as error:
                log.debug("waiting for the store", extra={"reason": str(error)})
                await asyncio.sleep(_READY_PAUSE_S)
            else:
                return

    @contextlib.asynccontextmanager
    async def fresh(self) -> AsyncIterator[None]:
        """Within it, newly published views become known by themselves."""
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(self._registry.keep_fresh(self._settings.refresh_s))
            try:
                yield
            finally:
                keeper.cancel()

    @unary(f"{NAME}/GetFeatures")
    async def GetFeatures(self, call: Call[pb.GetFeaturesRequest]) -> pb.GetFeaturesResponse:  # noqa: N802
        if not call.request.request_views:
            answer, _ = await self._rows(call)
            return answer
        more_bytes = self._request_views.check(call.request, self._settings.max_rows)
        answer, plans = await self._rows(call, more_bytes)
        # as they were read: what is published may have changed meanwhile
        self._request_views.add(call.request, answer, {plan.view.name: plan.view.columns for plan in plans})
        return answer

    async def _rows(
        self, call: Call[pb.GetFeaturesRequest], more_bytes: int = 0
    ) -> tuple[pb.GetFeaturesResponse, list[Plan]]:
        """The rows of the stored views, and how they were read. more_bytes: what else the answer will hold."""
        wanted = read_request(call.request, self._settings.max_rows)
        plans = await self._find([want.view for want in wanted])
        _check_size(plans, wanted, more_bytes)
        stored = await self._stored(call, plans, wanted)
        with contextlib.suppress(SchemaChanged):
            if not _vanished(wanted, stored):
                return self._answer(plans, wanted, stored), plans
        with contextlib.suppress(CallError):  # the rows are here; what is known must do
            await self._registry.refresh()
        known, plans = plans, self._registry.find(want.view for want in wanted)
        if [plan.key_prefix for plan in plans] != [plan.key_prefix for plan in known]:
            stored = await self._stored(call, plans, wanted)
        return self._answer(plans, wanted, stored, foreign_is_missing=True), plans

    @unary(f"{NAME}/DescribeViews")
    async def DescribeViews(self, call: Call[pb.DescribeViewsRequest]) -> pb.DescribeViewsResponse:  # noqa: N802
        names = list(call.request.views)
        if len(names) > _MAX_VIEWS:
            raise BadInput(Violation("views", f"must hold at most {_MAX_VIEWS} names, got {len(names)}"))
        if not names and not self._registry.plans:
            await self._registry.refresh()
        on_request = {view.name: view for view in self._request_views.descriptions()}
        stored = [name for name in names if name not in on_request]
        plans = await self._find(stored) if names else list(self._registry.plans.values())
        described = {plan.view.name: _description(plan) for plan in plans} | on_request
        return pb.DescribeViewsResponse(views=[described[name] for name in names or described])

    async def WriteEvents(  # type: ignore[override]  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.WriteEventsRequest],
        context: grpc.aio.ServicerContext[pb.WriteEventsRequest, pb.WriteEventsResponse],
    ) -> None:
        if self._streams is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server has no views maintained by stream")
        await self._streams.ingest.serve(request_iterator, context)

    async def _find(self, names: Sequence[str]) -> list[Plan]:
        try:
            return self._registry.find(names)
        except NotFound:
            await self._registry.refresh()
            return self._registry.find(names)

    async def _stored(
        self, call: Call[pb.GetFeaturesRequest], plans: Sequence[Plan], wanted: Sequence[Wanted]
    ) -> StoredRows:
        """The rows of all views, one after the other."""
        keys: Keys = []
        for plan, want in zip(plans, wanted, strict=True):
            prefix = plan.key_prefix
            keys += [f"{prefix}{entity_id}}}" for entity_id in want.entity_ids]
        stored = self._cache.peek(keys) if self._cache is not None else None
        if stored is None:
            with self.tracing.internal("store read", call.caller.traceparent) as span:
                span.set(attributes.FEATURE_VIEWS, len(plans))
                span.set(attributes.FEATURE_ROWS, len(keys))
                stored = await self.reads.ask(Call(keys, call.caller))
        return stored

    async def _read_views(self) -> list[PublishedView]:
        return await self._store.views(self._settings.store_timeout_s)

    async def _read(self, batch: Sequence[Call[Keys]]) -> list[StoredRows | Exception]:
        latest = max(call.caller.deadline for call in batch)
        timeout_s = max(0.0, min(self._settings.store_timeout_s, latest - time.monotonic()))
        requests = [call.request for call in batch]
        if len(batch) == 1:
            return [await self._fetch(requests[0], timeout_s, requests)]
        keys = list(dict.fromkeys(itertools.chain.from_iterable(requests)))
        try:
            found = await self._fetch(keys, timeout_s, requests)
        except PartlyUnavailable as partly:  # those who asked for what is there get it
            rows = dict(zip(keys, partly.values, strict=True))
            return [
                partly if not partly.failed.isdisjoint(request) else [rows[key] for key in request]
                for request in requests
            ]
        if len(keys) == sum(map(len, requests)):  # no key was asked for twice, so they are in the order of requests
            left = iter(found)
            return [list(itertools.islice(left, len(request))) for request in requests]
        rows = dict(zip(keys, found, strict=True))
        return [[rows[key] for key in request] for request in requests]

    def _fetch(self, keys: Keys, timeout_s: float, requests: Sequence[Keys]) -> Awaitable[StoredRows]:
        if self._cache is None:
            return self._store.fetch(keys, timeout_s)
        return self._cache.fetch(keys, timeout_s, requests)

    def _answer(
        self, plans: list[Plan], wanted: list[Wanted], stored: StoredRows, *, foreign_is_missing: bool = False
    ) -> pb.GetFeaturesResponse:
        answer = pb.GetFeaturesResponse()
        now_us, at = self._now_us(), 0
        for plan, want in zip(plans, wanted, strict=True):
            end = at + len(want.entity_ids)
            rows = plan.layout.unpack(stored[at:end], want.as_of_us or now_us, foreign_is_missing=foreign_is_missing)
            at = end
            if rows.unreadable:
                self._tell_of_damage(plan, rows)
            told = answer.views.add()  # setting fields costs less than naming them here
            told.view, told.columns = want.view, len(plan.view.columns)
            told.schema_hash = plan.layout.schema.schema_hash
            told.values, told.status, told.event_us, told.age_s = rows[:4]
        if self._served is not None and self._served.takes_this():
            for want, told in zip(wanted, answer.views, strict=True):
                kept = told.event_us, told.values, told.status
                self._served.keep(want.view, told.schema_hash, want.entity_ids, want.as_of_us or now_us, *kept)
        return answer

    def _tell_of_damage(self, plan: Plan, rows: Rows) -> None:
        self.unreadable_rows += rows.unreadable
        if plan.view.name not in self._damaged_views:  # once per view: damage rarely comes alone
            self._damaged_views.add(plan.view.name)
            log.error("stored rows cannot be read; they count as missing", extra={"view": plan.view.name})


def _vanished(wanted: list[Wanted], stored: StoredRows) -> bool:
    """Whether a view has none of its rows: perhaps its generation was replaced and removed."""
    if all(stored):
        return False
    at = 0
    for want in wanted:
        end = at + len(want.entity_ids)
        if not any(stored[at:end]):
            return True
        at = end
    return False


def read_request(request: pb.GetFeaturesRequest, max_rows: int) -> list[Wanted]:
    """What is wanted of each view. Raises BadInput naming every field that is wrong, up to a few."""
    # a slice of a repeated field is a list, at half the price of list()
    wanted = [Wanted(keys.view, keys.entity_ids[:], keys.as_of_us[:]) for keys in request.views]
    violations: list[Violation] = []
    if not 0 < len(wanted) <= _MAX_VIEWS:
        violations.append(Violation("views", f"must hold 1 to {_MAX_VIEWS} views, got {len(wanted)}"))
    rows = 0
    for i, (view, entity_ids, as_of_us) in enumerate(wanted):
        n = len(entity_ids)
        rows += n
        if not view:
            violations.append(Violation(f"views[{i}].view", "must name a view, got ''"))
        if not n:
            violations.append(Violation(f"views[{i}].entity_ids", "must hold at least 1 id, got 0"))
        elif "" in entity_ids or max(map(len, entity_ids)) > _SURELY_SHORT:
            violations += _id_violations(i, entity_ids)
        if as_of_us and len(as_of_us) != n:
            told = f"must be empty or hold one time per entity id, {n}, got {len(as_of_us)}"
            violations.append(Violation(f"views[{i}].as_of_us", told))
        elif as_of_us and min(as_of_us) < 1:
            j = next(j for j, moment in enumerate(as_of_us) if moment < 1)
            told = f"must be microseconds since 1970, at least 1, got {as_of_us[j]}"
            violations.append(Violation(f"views[{i}].as_of_us[{j}]", told))
        if len(violations) >= _MOST_VIOLATIONS:
            break
    if rows > max_rows:
        violations.insert(0, Violation("views", f"must ask for at most {max_rows} rows in all, got {rows}"))
    if violations:
        raise BadInput(*violations[:_MOST_VIOLATIONS])
    return wanted


def _id_violations(i: int, entity_ids: list[str]) -> list[Violation]:
    found = (
        Violation(
            f"views[{i}].entity_ids[{j}]",
            f"must have 1 to {MAX_ID_BYTES} bytes of UTF-8, got {size} bytes: {entity_id[:_MOST_SHOWN]!r}",
        )
        for j, entity_id in enumerate(entity_ids)
        if not 0 < (size := len(entity_id.encode())) <= MAX_ID_BYTES
    )
    return list(itertools.islice(found, _MOST_VIOLATIONS))


def _check_size(plans: list[Plan], wanted: list[Wanted], more_bytes: int) -> None:
    size = more_bytes + sum(
        plan.layout.answer_bytes * len(want.entity_ids) for plan, want in zip(plans, wanted, strict=True)
    )
    if size > MAX_MESSAGE_BYTES // 2:
        raise BadInput(
            Violation("views", f"must ask for at most {MAX_MESSAGE_BYTES // 2} bytes of rows in all, got {size}")
        )


def _description(plan: Plan) -> pb.ViewDescription:
    view = plan.view
    return pb.ViewDescription(
        name=view.name,
        entity=view.entity,
        columns=view.columns,
        schema_hash=plan.layout.schema.schema_hash,
        ttl_s=view.ttl_s,
        watermark_us=view.watermark_us,
        rows=view.rows,
    )
