"""The views that can be read, as last seen in the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.feature.define.schema import ViewSchema
from services.feature.online.catalogue import PublishedView
from services.feature.online.packed import RowLayout, Rows
from services.resilience.call import Clock
from services.resilience.errors import CallError, NotFound

log = logging.getLogger(__name__)

MIN_BETWEEN_S = 1.0  # requests for views that do not exist must not become reads of the store
_MOST_NAMES_TOLD = 32


class Layout(Protocol):
    """How what the store holds becomes rows: see RowLayout and, for stream views, StateLayout."""

    @property
    def schema(self) -> ViewSchema: ...
    @property
    def answer_bytes(self) -> int: ...
    def unpack(
        self, rows: Sequence[bytes | None], as_of_us: int | Sequence[int], *, foreign_is_missing: bool = False
    ) -> Rows: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """How one view is read, worked out once: what is published of it, and the layout of its rows."""

    view: PublishedView
    key_prefix: str
    layout: Layout


def row_layout(view: PublishedView) -> Layout | None:
    """None for a view whose rows have to be finished by somebody who has its definition."""
    return RowLayout(view.schema()) if view.kind == "row" else None


class Registry:
    """Knows views by name. Belongs to one event loop."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Iterable[PublishedView]]],
        key_prefix: Callable[[str, int], str],
        clock: Clock = time.monotonic,
        layout_of: Callable[[PublishedView], Layout | None] = row_layout,
    ) -> None:
        """read: the published views. key_prefix: of a view's rows in a generation.

        layout_of: how a view's rows are read; views without one are left out.
        """
        self._read, self._key_prefix, self._clock, self._layout_of = read, key_prefix, clock, layout_of
        self._seen: list[PublishedView] = []
        self._plans: Mapping[str, Plan] = {}
        self._undefined: set[str] = set()  # published, and not readable here
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
            if name in self._undefined:
                told = f"view {name!r} is published with another definition than this server has, or it has none of it"
                raise NotFound(f"{told}; readable here are: {listed or 'none'}") from None
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
        if views != self._seen:
            self._seen = views
            plans = ((view.name, self._plan(view)) for view in views)
            self._plans = {name: plan for name, plan in plans if plan is not None}
            self._undefined = {view.name for view in views} - self._plans.keys()
            log.info("views changed", extra={"views": {view.name: view.rows for view in views}})

    def _plan(self, view: PublishedView) -> Plan | None:
        known = self._plans.get(view.name)
        if known is not None and known.view == view:
            return known
        layout = self._layout_of(view)
        if layout is None:
            log.error("view cannot be read here: no definition", extra={"view": view.name, "kind": view.kind})
            return None
        return Plan(view, self._key_prefix(view.name, view.generation), layout)
