"""Every entity's row as of one moment, loaded into generations of their own that readers then turn to together.

Whatever goes wrong before that, readers see nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from services.feature.define.definition import View
from services.feature.offline.store import OfflineStore, Spine
from services.feature.online.store import MAX_ID_BYTES, OnlineStore
from services.resilience.errors import CallError

_CELLS_AT_ONCE = 20_000_000  # 9 bytes each, and twice that, as the next part is computed while one is loaded

Tell = Callable[[str, int, int], None]
"""Told the view, the rows that are loaded, and all of them."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """kind: "row", or "state" for a stream view. rows: that are in the generation; skipped: entities whose ids are
    none. verified: rows that were read back. replaced: the generation that was published before, 0 for none.
    overtaken: a later one was published meanwhile, and ours is gone. removed: rows of the one before, None for not yet.
    """

    view: str
    kind: str
    generation: int
    rows: int
    seconds: float
    skipped: int = 0
    verified: int = 0
    replaced: int = 0
    overtaken: bool = False
    removed: int | None = None
    rows_per_s: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows_per_s", self.rows / self.seconds if self.seconds > 0 else 0.0)


@dataclass(frozen=True, slots=True)
class _Part:
    entity_ids: Sequence[str]
    values: NDArray[np.float32]
    null: NDArray[np.bool_]


async def load(
    offline: OfflineStore,
    store: OnlineStore,
    views: Sequence[View],
    moment_us: int,
    tell: Tell = lambda _view, _done, _all: None,
    *,
    at_once: int = 0,
) -> list[Loaded]:
    """Loads, reads some rows back, and publishes all views in one step.

    at_once: rows that are computed together, 0 for as many as fit.
    Raises OfflineError or what the store raises; what was loaded is then removed again.
    """
    if stream := next((view.name for view in views if view.stream), ""):
        raise ValueError(f"view {stream!r} is maintained by stream: its states are built, not loaded")
    done: list[Loaded] = []
    try:
        for view in views:
            # one by one: what is there when another fails is removed
            done.append(await _load(offline, store, view, moment_us, tell, at_once))  # noqa: PERF401
        published = await store.publish(
            [view.schema() for view in views],
            moment_us,
            {one.view: one.rows for one in done},
            {one.view: one.generation for one in done},
        )
    except Exception:
        for one in done:
            with contextlib.suppress(CallError):  # then a later materialisation removes it
                await store.retire(one.view, one.generation, 0.0)
        raise
    return [
        replace(one, replaced=published.replaced.get(one.view, 0), overtaken=one.view in published.overtaken)
        for one in done
    ]


async def retire(store: OnlineStore, loaded: Sequence[Loaded], grace_s: float) -> list[Loaded]:
    """Removes what was replaced, after the grace; told how many rows those were."""

    async def removed(one: Loaded) -> Loaded:
        if not one.replaced or one.overtaken:
            return one
        return replace(one, removed=await store.retire(one.view, one.replaced, grace_s))

    return list(await asyncio.gather(*map(removed, loaded)))


async def _load(
    offline: OfflineStore, store: OnlineStore, view: View, moment_us: int, tell: Tell, at_once: int
) -> Loaded:
    began = time.monotonic()
    schema = view.schema()
    found = await asyncio.to_thread(offline.entity_ids, view, moment_us)
    ids = [entity_id for entity_id in found if 0 < len(entity_id.encode()) <= MAX_ID_BYTES]
    generation = await store.begin(schema)
    rows = verified = 0
    tell(view.name, 0, len(ids))
    try:
        parts = _parts(offline, view, ids, moment_us, at_once)
        # the queries block, and the online store's connection must not wait for them
        computing = asyncio.create_task(asyncio.to_thread(next, parts, None))
        try:
            while (part := await computing) is not None:
                computing = asyncio.create_task(asyncio.to_thread(next, parts, None))
                for start in range(0, len(part.entity_ids), _TOLD_EVERY):
                    some = slice(start, start + _TOLD_EVERY)
                    given = part.entity_ids[some], moment_us, part.values[some], part.null[some]
                    await store.load(schema, generation, *given)
                    rows += len(given[0])
                    tell(view.name, rows, len(ids))
                given = part.entity_ids, moment_us, part.values, part.null
                verified += await store.verify(schema, generation, *given)
        finally:
            # a query cannot be cut off; whoever ends the loop waits for it
            await asyncio.gather(computing, return_exceptions=True)
    except Exception:
        with contextlib.suppress(CallError):
            await store.retire(view.name, generation, 0.0)
        raise
    seconds = time.monotonic() - began
    return Loaded(view.name, "row", generation, rows, seconds, len(found) - len(ids), verified)


_TOLD_EVERY = 16_384


def _parts(offline: OfflineStore, view: View, ids: Sequence[str], moment_us: int, at_once: int) -> Iterator[_Part]:
    step = at_once or max(1, _CELLS_AT_ONCE // len(view.columns))
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        computed = offline.compute(view, Spine(some, np.full(len(some), moment_us, dtype=np.int64)))
        yield _Part(some, computed.float32(), computed.null)
