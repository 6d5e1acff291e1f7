"""What the streamed events are counted into: 20 features of one entity, some over windows."""

from __future__ import annotations

import asyncio

from loadtest.bench.feature_arms.ours import MESH
from services.feature.define.definition import Aggregate, Source, View, latest, windowed
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.feature.stream.archive import Archive
from services.feature.stream.log import EventLog
from services.feature.stream.rebuild import Builder
from services.feature.stream.states import StateStore

_CONNECT_S = 10.0

PAYMENTS = Source(
    "payments",
    "payments/*.parquet",
    event_us="event_us",
    known_us="known_us",
    sequence="number",
    entities=("account",),
    values=("amount", "number_paid"),
)
ACCOUNT = View(
    "account",
    "account",
    (
        *windowed(PAYMENTS, "", (Aggregate.COUNT,), ("",)),
        *latest(PAYMENTS, "number_paid"),
        *windowed(
            PAYMENTS,
            "amount",
            (Aggregate.COUNT, Aggregate.SUM, Aggregate.MEAN, Aggregate.STD, Aggregate.MIN, Aggregate.MAX),
            ("1h", "24h", "7d"),
        ),
    ),
    stream=True,
)
VIEWS = (ACCOUNT,)
COUNTED_AT, LATEST_AT = 0, 1
"""The columns that tell how many events are counted, and which is the latest."""


def build(port: int, folder: str) -> int:
    """Makes the view readable, from no files; the generation."""
    return asyncio.run(_build(f"redis://127.0.0.1:{port}", folder))


async def _build(url: str, folder: str) -> int:
    async with Valkey(url) as client:
        await client.connected(_CONNECT_S)
        table, states = ValkeyTable(client), StateStore(client, MESH)
        archive = Archive(client, MESH, EventLog(client, MESH), folder)
        built = await Builder(folder, archive, OnlineStore(table, MESH), table, states).build(ACCOUNT)
    return built.generation
