"""How far the sources of stream views are known to be complete, as last seen in the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from services.feature.define.definition import View
from services.feature.stream.states import StateStore
from services.resilience.errors import CallError

log = logging.getLogger(__name__)

_TIMEOUT_S = 1.0


class Watermarks:
    """Every event of a source that was known before its watermark is counted, says its producer."""

    def __init__(self, states: StateStore, sources: Iterable[str]) -> None:
        self._states = states
        self._watermarks = dict.fromkeys(sources, 0)

    def of(self, view: View) -> int:
        """The watermark of all the view's sources, microseconds since 1970 UTC; 0 where one has none."""
        return min(self._watermarks.get(source.name, 0) for source in view.sources)

    async def refresh(self) -> None:
        """Raises what the store raises; what is known stays."""
        for source in self._watermarks:
            self._watermarks[source] = (await self._states.applied(source, _TIMEOUT_S)).watermark_us

    async def keep_fresh(self, every_s: float) -> None:
        """Refreshes until cancelled. While the store cannot be read, rows look older than they are."""
        while True:
            try:
                await self.refresh()
            except CallError as error:
                log.debug("watermarks not refreshed", extra={"reason": str(error)})
            await asyncio.sleep(every_s)
