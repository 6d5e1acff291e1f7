"""The online store of a mesh, for a command that uses it once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from services.feature.define.definition import View
from services.feature.online.store import OnlineStore
from services.feature.online.table import Table
from services.feature.online.tables import check_url, open_table
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.feature.stream.log import EventLog
from services.feature.stream.states import StateStore
from services.resilience.errors import Unavailable

WITHIN_S = 5.0
_FIRST_ANSWER_S = 2.0  # nobody should wait longer to learn that there is no store
_PAUSE_S = 0.02
_ONE_SERVER = ("redis", "rediss", "unix")
"""Schemes of a store that scripts may touch as a whole: stream views need one."""


@dataclass(frozen=True, slots=True)
class Reached:
    """mesh: its name. valkey: None where the store is a cluster or DynamoDB, which keep no stream views."""

    mesh: str
    store: OnlineStore
    table: Table
    valkey: Valkey | None = None

    @property
    def states(self) -> StateStore | None:
        return StateStore(self.valkey, self.mesh) if self.valkey else None

    @property
    def events(self) -> EventLog | None:
        return EventLog(self.valkey, self.mesh) if self.valkey else None

    async def complete_us(self, views: Sequence[View]) -> Mapping[str, int]:
        """Stream view -> up to where its sources are known to be complete, microseconds since 1970; 0 for unknown."""
        states = self.states
        found: dict[str, int] = {}
        for view in views:
            if view.stream and states:
                applied = [await states.applied(source.name, WITHIN_S) for source in view.sources]
                found[view.name] = min(one.watermark_us for one in applied)
        return found


@contextlib.asynccontextmanager
async def reach(url: str, mesh: str, within_s: float = _FIRST_ANSWER_S) -> AsyncIterator[Reached]:
    """Raises ValueError for a URL that names no store, and Unavailable where it does not answer in time."""
    check_url(url)
    async with contextlib.AsyncExitStack() as stack:
        if urlsplit(url).scheme in _ONE_SERVER:
            valkey = await stack.enter_async_context(Valkey(url))
            table: Table = ValkeyTable(valkey)
            found = Reached(mesh, OnlineStore(table, mesh), table, valkey)
        else:
            table = await stack.enter_async_context(open_table(url))
            found = Reached(mesh, OnlineStore(table, mesh), table)
        await _answers(table, within_s)
        yield found


async def _answers(table: Table, within_s: float) -> None:
    """A connection that was begun just now takes a moment."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return await table.ping(max(_PAUSE_S, deadline - time.monotonic()))
        except Unavailable:
            if time.monotonic() + _PAUSE_S >= deadline:
                raise
            await asyncio.sleep(_PAUSE_S)
