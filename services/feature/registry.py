"""The views that can be read, as last seen in the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from services.feature.packed import RowLayout
from services.feature.store import PublishedView
from services.resilience.call import Clock
from services.resilience.errors import CallError, NotFound

log = logging.getLogger(__name__)

MIN_BETWEEN_S = 1.0  # requests for views that do not exist must not become reads of the store
_MOST_NAMES_TOLD = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """How one view is read, worked out once: what is published of it, and the layout of its rows."""

    view: PublishedView
    key_prefix: str
    layout: RowLayout


class Registry:
    """Knows views by name. Belongs to one event loop."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Iterable[PublishedView]]],
        key_prefix: Callable[[str], str],
        clock: Clock = time.monotonic,
    ) -> None:
        """read: the published views. key_prefix: of a view's rows."""
        self._read, self._key_prefix, self._clock = read, key_prefix, clock
        self._plans: Mapping[str, Plan] = {}
        self._lock = asyncio.Lock()
        self._tried_at = -float("inf")
        self._failure: CallError | None = None

    @property
    def plans(self) -> Mapping[str, Plan]:
        """Plans by view name; a new mapping whenever something changed."""
        return self._plans

    def find(self, names: Iterable[str]) -> list[Plan]:
        """One plan per name. Raises NotFound naming the view and those that exist."""
        plans = self._plans
        try:
            return [plans[name] for name in names]
        except KeyError as error:
            known = sorted(plans)
            listed = ", ".join(known[:_MOST_NAMES_TOLD]) + (", ..." if len(known) > _MOST_NAMES_TOLD else "")
            name = str(error.args[0])[:64]
            raise NotFound(f"view {name!r} is not published; published are: {listed or 'none'}") from None

    async def refresh(self) -> None:
        """Reads the views again, unless that was tried within the last second; callers at once share one read.

        Raises what the last try raised, if it failed; the views stay as they were.
        """
        async with self._lock:
            if self._clock() - self._tried_at >= MIN_BETWEEN_S:
                self._tried_at = self._clock()
                try:
                    self._take(list(await self._read()))
                    self._failure = None
                except CallError as error:
                    self._failure = error
            if self._failure is not None:
                raise self._failure.with_traceback(None)

    async def keep_fresh(self, every_s: float) -> None:
        """Refreshes until cancelled. While the store cannot be read, what is known stays."""
        while True:
            try:
                await self.refresh()
            except CallError as error:
                log.debug("views not refreshed", extra={"reason": str(error)})
            await asyncio.sleep(every_s)

    def _take(self, views: list[PublishedView]) -> None:
        if self._plans and not views:
            # a store that was restarted empty: its rows are gone, which readers see as MISSING and degrade by; to
            # forget how rows look would turn that into an error of the caller
            log.warning("the store lists no views any more; keeping those known", extra={"views": list(self._plans)})
            return
        if views != [plan.view for plan in self._plans.values()]:
            self._plans = {view.name: self._plan(view) for view in views}
            log.info("views changed", extra={"views": {view.name: view.rows for view in views}})

    def _plan(self, view: PublishedView) -> Plan:
        known = self._plans.get(view.name)
        if known is not None and known.view == view:
            return known
        return Plan(view, self._key_prefix(view.name), RowLayout(view.schema()))
