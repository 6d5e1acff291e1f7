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
from services.feature.online.store import OnlineStore, is_id
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
    """Some of a view's rows, of `all`.

    skipped: entities without a row. last: whether the view has no more.
    """

    view: View
    entity_ids: Sequence[str]
    values: NDArray[np.float32]
    null: NDArray[np.bool_]
    all: int
    skipped: int
    last: bool


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
    begun: dict[str, int] = {}
    try:
        done = await _loaded(offline, store, views, moment_us, tell, at_once, begun)
        published = await store.publish(
            [view.schema() for view in views],
            moment_us,
            {one.view: one.rows for one in done},
            {one.view: one.generation for one in done},
        )
    except Exception:
        for view_name, generation in begun.items():
            with contextlib.suppress(CallError, ValueError):  # a later one removes it, or it was published after all
                await store.retire(view_name, generation, 0.0)
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


async def _loaded(
    offline: OfflineStore,
    store: OnlineStore,
    views: Sequence[View],
    moment_us: int,
    tell: Tell,
    at_once: int,
    begun: dict[str, int],
) -> list[Loaded]:
    """begun: is told of each view's generation before it has a row."""
    done: list[Loaded] = []
    parts = _parts(offline, views, moment_us, at_once)
    # the queries block, and the online store's connection must not wait for them
    computing = asyncio.create_task(asyncio.to_thread(next, parts, None))
    began, rows, verified = time.monotonic(), 0, 0
    try:
        while (part := await computing) is not None:
            computing = asyncio.create_task(asyncio.to_thread(next, parts, None))  # perhaps of the next view
            view = part.view
            if view.name not in begun:
                begun[view.name] = await store.begin(view.schema())
                tell(view.name, 0, part.all)
            verified += await _load(store, part, begun[view.name], moment_us, tell, rows)
            rows += len(part.entity_ids)
            if part.last:
                now = time.monotonic()
                done.append(Loaded(view.name, "row", begun[view.name], rows, now - began, part.skipped, verified))
                began, rows, verified = now, 0, 0
    finally:
        # a query cannot be cut off; whoever ends the loop waits for it
        await asyncio.gather(computing, return_exceptions=True)
    return done


async def _load(store: OnlineStore, part: _Part, generation: int, moment_us: int, tell: Tell, before: int) -> int:
    """How many rows were read back. before: rows of the view that are loaded already."""
    schema = part.view.schema()
    for start in range(0, len(part.entity_ids), _TOLD_EVERY):
        some = slice(start, start + _TOLD_EVERY)
        ids = part.entity_ids[some]
        await store.load(schema, generation, ids, moment_us, part.values[some], part.null[some])
        tell(part.view.name, before + start + len(ids), part.all)
    return await store.verify(schema, generation, part.entity_ids, moment_us, part.values, part.null)


_TOLD_EVERY = 16_384


def _parts(offline: OfflineStore, views: Sequence[View], moment_us: int, at_once: int) -> Iterator[_Part]:
    """View after view, each with at least one part. The very first is empty: it tells how many rows will follow."""
    for number, view in enumerate(views):
        found = offline.entity_ids(view, moment_us)
        ids = [entity_id for entity_id in found if is_id(entity_id)]
        skipped, width = len(found) - len(ids), len(view.columns)
        if not number or not ids:
            none = np.zeros((0, width), np.float32)
            yield _Part(view, [], none, none.astype(np.bool_), len(ids), skipped, last=not ids)
        step = at_once or max(1, _CELLS_AT_ONCE // width)
        for start in range(0, len(ids), step):
            some = ids[start : start + step]
            computed = offline.compute(view, Spine(some, np.full(len(some), moment_us, dtype=np.int64)))
            last = start + step >= len(ids)
            yield _Part(view, some, computed.float32(), computed.null, len(ids), skipped, last)
