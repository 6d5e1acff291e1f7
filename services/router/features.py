"""Stored features of many requests in one call, put straight into model input rows."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from services.mesh import attributes
from services.mesh.query import Query
from services.mesh.telemetry import Recorded
from services.resilience.call import Call
from services.resilience.coalesce import Coalescer, Limits
from services.resilience.errors import Reason, Unavailable
from services.router.callees import Callee
from services.router.plan import Floats, TierPlan
from tenfold.feature.v1 import feature_pb2 as pb

GET: Final = "/tenfold.feature.v1.FeatureService/GetFeatures"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The row of `query` for the tier of `plan`. The query has an id for each of the plan's entities."""

    query: Query
    plan: TierPlan


@dataclass(slots=True)
class Gathered:
    """row: float32 (columns,), all but what the request itself carries. Counts are of stored values that are read.

    max_age_s: of the oldest row that was used, seconds; 0 where none was.
    """

    row: Floats
    ok: int = 0
    null: int = 0
    missing: int = 0
    expired: int = 0
    max_age_s: float = 0.0

    @property
    def missing_share(self) -> float:
        """Of the stored values that are read, missing or expired: 0 to 1."""
        total = self.ok + self.null + self.missing + self.expired
        return (self.missing + self.expired) / total if total else 0.0

    @classmethod
    def nothing(cls, plan: TierPlan) -> Gathered:
        """What is left of a row when no stored feature could be read."""
        return cls(plan.blank.copy(), missing=len(plan.target))


@dataclass(slots=True)
class _Asked:
    """What the members of a batch ask of one view: each plan's members stand side by side.

    starts: plan -> where its members begin. inputs: of a view on request, input -> a number per
    member, NaN where it was left out; its ids are empty texts.
    """

    ids: list[str] = field(default_factory=list)
    as_of_us: list[int] = field(default_factory=list)
    starts: dict[TierPlan, int] = field(default_factory=dict)
    inputs: dict[str, list[float]] | None = None


class _Read(NamedTuple):
    """A view's answer as bytes: values and status of (n, columns), ages of (n,)."""

    schema_hash: int
    columns: int
    values: bytes
    status: bytes
    age_s: bytes

    def part(self, start: int, count: int) -> _Read:
        """`count` rows from `start`."""
        first, last = start * self.columns, (start + count) * self.columns
        return self._replace(
            values=self.values[4 * first : 4 * last],
            status=self.status[first:last],
            age_s=self.age_s[4 * start : 4 * (start + count)],
        )


class Features:
    """Lookups for every model of the mesh, coalesced into one call."""

    def __init__(self, callee: Callee, limits: Limits, stale: Callable[[], None]) -> None:
        """stale: told when an answer has another schema than the plans."""
        self._callee = callee
        self._limits = limits
        self._stale = stale
        self._calls: Coalescer[Wanted, Gathered] = Coalescer(self._fetch, limits)

    async def of(self, call: Call[Wanted]) -> Gathered:
        """Raises Refused, DeadlineExceeded, CalleeError or Unavailable where the features could not be had."""
        if not call.request.plan.views:
            return Gathered(call.request.plan.blank.copy())
        return await self._calls.ask(call)

    def __len__(self) -> int:
        """How many lookups wait and are not yet under way."""
        return len(self._calls)

    @property
    def wait_s(self) -> float:
        """How long a lookup waits before it leaves, seconds."""
        return self._callee.wait_s(len(self._calls), self._limits.max_batch, self._limits.max_in_flight)

    async def _fetch(self, calls: Sequence[Call[Wanted]]) -> list[Gathered | Exception]:
        groups: dict[TierPlan, list[int]] = {}
        for i, call in enumerate(calls):
            groups.setdefault(call.request.plan, []).append(i)
        if len(groups) == 1 or not any(plan.on_request for plan in groups):
            return await self._fetch_at_once(calls, groups)
        # row i of a view on request is worked out from row i of each view it reads: only one plan's rows are aligned
        members = list(groups.values())
        parts = [[calls[i] for i in some] for some in members]
        fetched = await asyncio.gather(
            *(self._fetch_at_once(part, {part[0].request.plan: list(range(len(part)))}) for part in parts),
            return_exceptions=True,
        )
        answers: list[Gathered | Exception] = [_UNANSWERED] * len(calls)
        for some, part in zip(members, fetched, strict=True):
            if isinstance(part, BaseException) and not isinstance(part, Exception):
                raise part
            for at, i in enumerate(some):
                answers[i] = part if isinstance(part, Exception) else part[at]
        return answers

    async def _fetch_at_once(
        self, calls: Sequence[Call[Wanted]], groups: dict[TierPlan, list[int]]
    ) -> list[Gathered | Exception]:
        asked = _merge(calls, groups)
        request = pb.GetFeaturesRequest()
        add = request.views.add
        for view, keys in asked.items():
            if keys.inputs is None:
                add(view=view, entity_ids=keys.ids, as_of_us=keys.as_of_us)
            else:
                inputs = {name: pb.InputNumbers(values=numbers) for name, numbers in keys.inputs.items()}
                request.request_views.add(view=view, inputs=inputs)

        def describe(span: Recorded) -> None:
            span.set(attributes.FEATURE_VIEWS, ",".join(asked))
            span.set(attributes.FEATURE_ROWS, sum(len(keys.ids) for keys in asked.values()))
            span.set(attributes.BATCH_SIZE, len(calls))

        raw = await self._callee.ask(
            GET, request.SerializeToString(), [call.caller for call in calls], describe=describe
        )
        try:
            views = _read(asked, pb.GetFeaturesResponse.FromString(raw))
        except (DecodeError, ValueError) as error:
            raise Unavailable(f"feature: its answer cannot be read: {error}", Reason.FEATURES_UNAVAILABLE) from error
        if len(groups) == 1:
            return self._split(calls[0].request.plan, len(calls), views)
        answers: list[Gathered | Exception] = [_UNANSWERED] * len(calls)
        for plan, members in groups.items():
            mine = {
                view.name: views[view.name].part(asked[view.name].starts[plan], len(members)) for view in plan.views
            }
            for i, answer in zip(members, self._split(plan, len(members), mine), strict=True):
                answers[i] = answer
        return answers

    def _split(self, plan: TierPlan, count: int, views: Mapping[str, _Read]) -> list[Gathered | Exception]:
        """The answers to `count` members of one plan, in order. views: the plan's, with rows of these members alone."""
        for view in plan.views:
            if views[view.name].schema_hash != view.schema_hash:
                self._stale()
                what = f"feature: the schema of view {view.name!r} changed; the router is learning it"
                return [Unavailable(what, Reason.FEATURES_UNAVAILABLE) for _ in range(count)]
        read = list(views.values())  # in the order of the plan's views, which is that of the request
        values = np.frombuffer(b"".join([view.values for view in read]), "<f4")
        status = np.frombuffer(b"".join([view.status for view in read]), np.uint8)
        age_s = np.frombuffer(b"".join([view.age_s for view in read]), "<f4").reshape(len(read), count)
        places = plan.places.of(count)
        rows = plan.rows(count, values, places)
        # a row expires, or is missing, as a whole: its first column tells
        oldest = np.where(_FRESH[status[plan.firsts.of(count)]], age_s.T, _ZERO).max(axis=1).tolist()
        used = status[places]
        return [_gathered(rows[i], used[i].tobytes(), oldest[i]) for i in range(count)]


_UNANSWERED: Final = Unavailable("feature: not answered", Reason.FEATURES_UNAVAILABLE)
_ZERO: Final = np.float32(0)
_FRESH: Final = np.isin(np.arange(256), (pb.STATUS_OK, pb.STATUS_NULL))
_OK, _NULL, _EXPIRED = (bytes([status]) for status in (pb.STATUS_OK, pb.STATUS_NULL, pb.STATUS_EXPIRED))


def _gathered(row: Floats, status: bytes, max_age_s: float) -> Gathered:
    """status: one byte for each stored value that is read."""
    ok, null, expired = status.count(_OK), status.count(_NULL), status.count(_EXPIRED)
    return Gathered(row, ok, null, len(status) - ok - null - expired, expired, max_age_s)


def _merge(calls: Sequence[Call[Wanted]], groups: dict[TierPlan, list[int]]) -> dict[str, _Asked]:
    """What to ask of each view for all members at once."""
    replay = any(call.request.query.request.as_of_us for call in calls)
    now_us = time.time_ns() // 1000 if replay else 0
    asked: dict[str, _Asked] = {}
    for plan, members in groups.items():
        queries = [calls[i].request.query for i in members]
        as_of_us = [query.request.as_of_us or now_us for query in queries] if replay else []
        for view in plan.views:
            keys = asked.get(view.name)
            if keys is None:
                keys = asked[view.name] = _Asked()
            keys.starts[plan] = len(keys.ids)
            if view.on_request:
                keys.ids += [""] * len(queries)
                keys.inputs = {name: [query.numbers.get(name, math.nan) for query in queries] for name in view.inputs}
                continue
            keys.ids += [query.entities[view.entity] for query in queries]
            keys.as_of_us += as_of_us
    return asked


def _read(asked: Mapping[str, _Asked], response: pb.GetFeaturesResponse) -> dict[str, _Read]:
    """The answer of each view. Raises ValueError where it is not what was asked for."""
    views = {
        rows.view: _Read(rows.schema_hash, rows.columns, rows.values, rows.status, rows.age_s)
        for rows in response.views
    }
    if list(views) != list(asked):
        raise ValueError(f"asked for views {list(asked)}, got {list(views)}")
    for (name, read), keys in zip(views.items(), asked.values(), strict=True):
        count = len(keys.ids)
        values = count * read.columns
        if (len(read.values), len(read.status), len(read.age_s)) != (4 * values, values, 4 * count):
            raise ValueError(f"view {name!r} has other than {count} rows of {read.columns} columns")
    return views
