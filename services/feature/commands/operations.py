"""What the commands do between definitions, files and the online store; nothing here knows of terminals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.feature.commands import entity, planning
from services.feature.commands.entity import EntityRow
from services.feature.commands.planning import Expected, PlannedView
from services.feature.commands.reach import WITHIN_S, Reached
from services.feature.commands.sampling import SampledRows, sampled
from services.feature.commands.stats import Looked, look
from services.feature.define.definition import INPUT, DefinitionError, RequestView, View
from services.feature.define.definitions import Definitions
from services.feature.offline.store import OfflineError, OfflineStore
from services.feature.online import loading
from services.feature.online.catalogue import PublishedView
from services.feature.online.loading import Loaded
from services.feature.stream.archive import Archive
from services.feature.stream.rebuild import Builder
from services.resilience.errors import NotFound

Tell = Callable[[str, float], None]
"""Told what is being done, and which share of all is done, 0 to 1."""

_FEW = 100  # states that tell how large one is


@dataclass(frozen=True, slots=True)
class Windows:
    """steps_us: of the far end, 0 where it is exact or there is no window. window: empty for all time."""

    window: str
    step_us: int


@dataclass(frozen=True, slots=True)
class Described:
    """One view of the definitions. kind: "stored", "stream" or "request"."""

    view: str
    kind: str
    entity: str
    columns: Sequence[str]
    sources: Sequence[str]
    windows: Sequence[Windows]
    ttl_s: float
    fingerprint: str


def described(definitions: Definitions) -> list[Described]:
    return [*map(_stored, definitions.views), *(_request(view, definitions) for view in definitions.request_views)]


def _stored(view: View) -> Described:
    windows = {(f.window_us, f.step_us): Windows(f.window, f.step_us) for f in view.features}
    return Described(
        view=view.name,
        kind="stream" if view.stream else "stored",
        entity=view.entity,
        columns=view.columns,
        sources=[source.name for source in view.sources],
        windows=[windows[key] for key in sorted(windows)],
        ttl_s=view.ttl_s,
        fingerprint=view.fingerprint(),
    )


def _request(view: RequestView, definitions: Definitions) -> Described:
    read = {name.partition(".")[0] for one in view.expressions(definitions.views) for name in one.columns} - {INPUT}
    reads = [*(f"{INPUT}.{name}" for name in view.inputs), *sorted(read)]
    return Described(view.name, "request", "", view.columns, reads, [], 0.0, "")


def streamed(definitions: Definitions) -> set[str]:
    """Sources whose events come by stream alone: no view that reads them is computed from files."""
    from_files = {source.name for view in definitions.views if not view.stream for source in view.sources}
    return set(definitions.sources) - from_files


def chosen(definitions: Definitions, names: Sequence[str]) -> list[View]:
    """Those views, in the order they are defined; all where none is named. Raises DefinitionError."""
    wanted = {definitions.view(name).name for name in names}
    return [view for view in definitions.views if not wanted or view.name in wanted]


def chosen_request_views(definitions: Definitions, names: Sequence[str]) -> tuple[list[View], list[RequestView]]:
    """Likewise, of request views too; and what those read comes along. Raises DefinitionError."""
    by_name = {view.name: view for view in definitions.request_views}
    if unknown := [name for name in names if name not in by_name and name not in {v.name for v in definitions.views}]:
        there = ", ".join([*(view.name for view in definitions.views), *by_name])
        raise DefinitionError(f"there is no view {unknown[0]!r}; there are: {there}")
    requested = [view for view in definitions.request_views if not names or view.name in names]
    wanted = {name for name in names if name not in by_name}
    stored = chosen(definitions, sorted(wanted)) if wanted or not names else []
    read = {
        column.partition(".")[0]
        for view in requested
        for expression in view.expressions(definitions.views)
        for column in expression.columns
    }
    present = {view.name for view in stored} | read
    return [view for view in definitions.views if view.name in present], requested


async def published(reached: Reached, names: Sequence[str]) -> list[PublishedView]:
    """Those views, all where none is named. Raises NotFound."""
    views = await reached.store.views(WITHIN_S)
    there = [view.name for view in views]
    if missing := [name for name in names if name not in there]:
        raise NotFound(f"view {missing[0]!r} is not published; published are: {', '.join(there) or 'none'}")
    return [view for view in views if not names or view.name in names]


async def plan(
    reached: Reached,
    offline: OfflineStore,
    definitions: Definitions,
    views: Sequence[View],
    at_us: int,
    now_us: int,
    tell: Tell = lambda _what, _share: None,
) -> list[PlannedView]:
    """Writes nothing."""
    there = await reached.store.views(WITHIN_S)
    expected: dict[str, Expected] = {}
    for done, view in enumerate(views):
        tell(view.name, done / len(views))
        try:
            # the query blocks
            expected[view.name] = Expected.of(await asyncio.to_thread(offline.entity_ids, view, at_us))
        except OfflineError:
            if not view.stream:  # its log may be all there is of it
                raise
    streams = {view.name for view in views if view.stream}
    tiles = [view for view in there if view.kind == "state" and view.name in streams]
    samples = await sampled(reached.store, tiles, _FEW) if tiles else {}
    return planning.planned(
        views,
        [view.name for view in definitions.views],
        there,
        expected,
        samples,
        await reached.store.next_generation(),
        reached.store.key_prefix,
        now_us,
    )


async def show(
    reached: Reached, definitions: Definitions, names: Sequence[str], entity_id: str, now_us: int
) -> list[EntityRow]:
    """What the store has of an entity. Raises NotFound for a view that is not published."""
    views = await published(reached, names)
    complete_us = await reached.complete_us(definitions.views)
    return await entity.rows_of(reached.store, views, definitions.views, entity_id, now_us, complete_us)


async def stats(
    reached: Reached, definitions: Definitions, names: Sequence[str], rows: int, now_us: int
) -> list[Looked]:
    """Of each published view. Raises NotFound for one that is not."""
    views = await published(reached, names)
    defined = {view.name: view for view in definitions.views}
    complete_us = await reached.complete_us(definitions.views)
    samples = await sampled(reached.store, views, rows)
    nothing = SampledRows([], [], 0)
    return [
        look(view, defined.get(view.name), samples.get(view.name, nothing), now_us, complete_us.get(view.name, 0))
        for view in views
    ]


async def materialize(
    reached: Reached,
    offline: OfflineStore,
    views: Sequence[View],
    at_us: int,
    grace_s: float | None,
    tell: loading.Tell = lambda _view, _done, _all: None,
    tell_share: Tell = lambda _what, _share: None,
) -> list[Loaded]:
    """Every entity's row as of a moment, and the states of stream views from what was known before it and the log.

    grace_s: that readers get to leave what was replaced before it is removed; None for leaving that to the next time.
    Raises OfflineError, ArchiveError, Gap, or what the store raises; what was published by then stays.
    """
    stored = [view for view in views if not view.stream]
    loaded = await loading.load(offline, reached.store, stored, at_us, tell) if stored else []
    built = [await _build(reached, offline, view, at_us, tell_share) for view in views if view.stream]
    found = [*loaded, *built]
    if grace_s is not None and any(one.replaced for one in found):
        tell_share(f"removing what was replaced, after {grace_s:.0f} s for readers", 1.0)
        found = await loading.retire(reached.store, found, grace_s)
    by_name = {one.view: one for one in found}
    return [by_name[view.name] for view in views]


async def _build(reached: Reached, offline: OfflineStore, view: View, before_us: int, tell: Tell) -> Loaded:
    """A stream view's states."""
    states, events = reached.states, reached.events
    if reached.valkey is None or states is None or events is None:
        raise ValueError(f"view {view.name!r} is maintained by stream, which needs one Valkey or Redis")
    there = {one.name: one.generation for one in await reached.store.views(WITHIN_S)}
    archive = Archive(reached.valkey, reached.mesh, events, str(offline.folder))
    builder = Builder(str(offline.folder), archive, reached.store, reached.table, states)
    began = time.monotonic()
    built = await builder.build(view, before_us, lambda what, share: tell(f"{view.name}: {what}", share))
    seconds = time.monotonic() - began
    return Loaded(view.name, "state", built.generation, built.entities, seconds, replaced=there.get(view.name, 0))
