"""The views that are maintained by stream, put together: events in, states kept, rows out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from services.feature.define.definition import Source
from services.feature.define.definitions import Definitions
from services.feature.online.catalogue import PublishedView
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.registry import Layout, row_layout
from services.feature.settings import FeatureSettings
from services.feature.stream.applier import Applier, StreamView
from services.feature.stream.finish import StateLayout
from services.feature.stream.freshness import Watermarks
from services.feature.stream.ingest import Ingest, IngestLimits
from services.feature.stream.log import EventLog, check_durable
from services.feature.stream.states import StateStore
from services.feature.tiles.kernel import ViewKernel
from services.resilience.errors import CallError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Streams:
    """What the service needs of them. views: with their kernels, by name."""

    valkey: Valkey
    ingest: Ingest
    applier: Applier
    watermarks: Watermarks
    views: Mapping[str, StreamView]

    async def ready(self, timeout_s: float) -> None:
        """Returns when events can be taken. Raises Unavailable."""
        await self.valkey.connected(timeout_s)

    def layout_of(self, published: PublishedView) -> Layout | None:
        """How a view is read: finished from states where that is what is published of it."""
        stream = self.views.get(published.name)
        if published.kind != "state" or stream is None:
            return row_layout(published)
        view = stream.view
        if f"{view.schema().schema_hash:016x}" != published.schema_hash:
            return None
        return StateLayout(view, stream.kernel, lambda: self.watermarks.of(view))


@contextlib.asynccontextmanager
async def streaming(
    settings: FeatureSettings, mesh: str, definitions: Definitions | None, store: OnlineStore
) -> AsyncIterator[Streams | None]:
    """Within it, events are applied and archived as the settings say; None where no view is maintained by stream."""
    views = [view for view in definitions.views if view.stream] if definitions else []
    if not views:
        yield None
        return
    if not _is_one_server(settings.store):
        log.error("views are not maintained by stream: their states need one Valkey or Redis, with replicas or not")
        yield None
        return
    async with Valkey(settings.store) as writing, Valkey(settings.store) as waiting:
        events = EventLog(writing, mesh, settings.max_log_events)
        states = StateStore(writing, mesh)
        streams = {view.name: StreamView(view, ViewKernel(view)) for view in views}
        sources = {source.name: source for view in views for source in view.sources}
        found = Streams(
            valkey=writing,
            ingest=Ingest(sources, events, _check_of(settings, writing), _limits(settings)),
            applier=Applier(streams.values(), store, events, EventLog(waiting, mesh), states, lease_s=settings.lease_s),
            watermarks=Watermarks(states, sources),
            views=streams,
        )
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(found.watermarks.keep_fresh(settings.refresh_s))]
            if settings.apply:
                running.append(tasks.create_task(found.applier.run()))
            if settings.archive:
                archiving = _keep_archiving(settings, mesh, writing, store, states, list(sources.values()))
                running.append(tasks.create_task(archiving))
            try:
                yield found
            finally:
                for task in running:
                    task.cancel()


def _check_of(settings: FeatureSettings, valkey: Valkey) -> Callable[[], Awaitable[None]]:
    async def check() -> None:
        if settings.events_durability == "disk":
            await check_durable(valkey, settings.events_timeout_s)

    return check


def _limits(settings: FeatureSettings) -> IngestLimits:
    ahead_us = -1 if settings.replay else round(settings.max_ahead_s * 1e6)
    return IngestLimits(settings.max_events, ahead_us, settings.events_timeout_s)


async def _keep_archiving(
    settings: FeatureSettings,
    mesh: str,
    valkey: Valkey,
    store: OnlineStore,
    states: StateStore,
    sources: Sequence[Source],
) -> None:
    """Until cancelled. What goes wrong is told and tried again."""
    from services.feature.stream.archive import Archive, ArchiveError  # its libraries are those of the offline store

    archive = Archive(valkey, mesh, EventLog(valkey, mesh), settings.archive)
    while True:
        for source in sources:
            try:
                while await archive.write(source, settings.archive_least):
                    pass
                published = {view.name: view.generation for view in await store.views()}
                await archive.trim(source, states, published)
            except (CallError, ArchiveError, OSError) as error:
                log.warning("events not archived", extra={"source": source.name, "reason": str(error)})
        await asyncio.sleep(settings.archive_s)


def _is_one_server(url: str) -> bool:
    """Whether a script may touch several keys there."""
    return urlsplit(url).scheme in ("redis", "rediss", "unix")
