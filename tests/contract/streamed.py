"""A source and a view that tests stream events into."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

from services.feature.define.definition import Aggregate, Source, View, latest, windowed
from services.feature.define.definitions import Definitions
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.feature.onrequest import RequestViews
from services.feature.service import NAME, FeatureService
from services.feature.settings import FeatureSettings
from services.feature.stream.archive import Archive
from services.feature.stream.log import EventLog
from services.feature.stream.rebuild import Builder, Built
from services.feature.stream.states import StateStore
from services.feature.stream.streams import Streams, streaming
from services.mesh.serve import Offer, Server
from tenfold.feature.v1 import feature_pb2 as pb
from tenfold.feature.v1 import feature_pb2_grpc

LONG_S = 20.0
MESH = "test"
NOW_US = 1_700_000_000_000_000
HOUR_US = 3_600_000_000

ORDERS = Source(
    "orders",
    "orders/*.parquet",
    event_us="ordered_us",
    known_us="known_us",
    sequence="order_id",
    entities=("shop", "customer"),
    values=("amount",),
    labels=("kind",),
)
SHOP = View(
    "shop",
    "shop",
    (
        *windowed(ORDERS, "", (Aggregate.COUNT,), ("1h", "")),
        *windowed(ORDERS, "amount", (Aggregate.SUM, Aggregate.MAX), ("1h", "")),
        *latest(ORDERS, "amount"),
    ),
    ttl_s=86_400.0,
    stream=True,
)
CUSTOMER = View("customer", "customer", windowed(ORDERS, "", (Aggregate.COUNT,), ("",)), stream=True)
VIEWS = (SHOP, CUSTOMER)
DEFINITIONS = Definitions(VIEWS)


def order(
    sequence: int,
    shop: str = "a",
    amount: float | None = 1.0,
    known_us: int = NOW_US,
    customer: str = "c",
    kind: str = "",
) -> pb.Event:
    event = pb.Event(sequence=sequence, event_us=known_us - 1, known_us=known_us)
    event.entities["shop"] = shop
    if customer:
        event.entities["customer"] = customer
    if amount is not None:
        event.values["amount"] = amount
    if kind:
        event.labels["kind"] = kind
    return event


def request(*events: pb.Event, watermark_us: int = 0) -> pb.WriteEventsRequest:
    return pb.WriteEventsRequest(source="orders", events=events, watermark_us=watermark_us)


@contextlib.asynccontextmanager
async def builder(url: str, folder: Path) -> AsyncIterator[Builder]:
    async with Valkey(url) as client:
        await client.connected(LONG_S)
        table = ValkeyTable(client)
        archive = Archive(client, MESH, EventLog(client, MESH), str(folder))
        yield Builder(str(folder), archive, OnlineStore(table, MESH), table, StateStore(client, MESH))


async def build(url: str, folder: Path, views: Iterable[View] = VIEWS) -> dict[str, Built]:
    async with builder(url, folder) as building:
        return {view.name: await building.build(view) for view in views}


@dataclass
class Serving:
    """A feature service with streams, and what a test needs to talk to it."""

    stub: feature_pb2_grpc.FeatureServiceAsyncStub
    streams: Streams
    settings: FeatureSettings

    async def write(self, *requests: pb.WriteEventsRequest) -> list[pb.WriteEventsResponse]:
        """The answers, in order. Raises AioRpcError where the stream ended badly."""
        call = self.stub.WriteEvents(_each(requests), timeout=LONG_S)
        return [answer async for answer in call]

    async def values(self, view: str, ids: Sequence[str], as_of_us: int = 0) -> dict[str, list[float]]:
        """Column -> its values."""
        rows = await self.rows(view, ids, as_of_us)
        matrix = np.frombuffer(rows.values, "<f4").reshape(len(ids), -1)
        columns = DEFINITIONS.view(view).columns
        return {name: matrix[:, at].tolist() for at, name in enumerate(columns)}

    async def rows(self, view: str, ids: Sequence[str], as_of_us: int = 0) -> pb.ViewRows:
        keys = pb.ViewKeys(view=view, entity_ids=ids, as_of_us=[as_of_us] * len(ids) if as_of_us else [])
        answer = await self.stub.GetFeatures(pb.GetFeaturesRequest(views=[keys]), timeout=LONG_S)
        return answer.views[0]

    async def caught_up(self) -> None:
        """Returns when every acknowledged event is counted."""

        async def is_caught_up() -> bool:
            return not (await self.streams.applier.lag())["orders"].events

        await eventually(is_caught_up)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Returns when it holds, which must be soon."""
    async with asyncio.timeout(LONG_S):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(
    url: str, transport: str = "grpcio", definitions: Definitions = DEFINITIONS, **options: object
) -> AsyncIterator[Serving]:
    with tempfile.TemporaryDirectory(prefix="tf") as folder:
        settings = FeatureSettings(
            mesh_file=Path(folder) / "tenfold.toml",
            listen=f"unix:{folder}/f.sock",
            instance="feature-0",
            store=url,
            transport=transport,
            **{"store_timeout_s": LONG_S, "refresh_s": 0.05, "lease_s": 0.5, **options},  # type: ignore[arg-type]
        )
        async with Valkey(url) as valkey:
            await valkey.connected(LONG_S)
            store = OnlineStore(ValkeyTable(valkey), MESH)
            async with streaming(settings, MESH, definitions, store) as streams:
                assert streams is not None
                service = FeatureService(store, settings, streams=streams, request_views=RequestViews(definitions))
                add = feature_pb2_grpc.add_FeatureServiceServicer_to_server
                server = Server(settings.listen, [Offer(NAME, service, add)], transport)
                await server.start()
                try:
                    async with service.fresh(), grpc.aio.insecure_channel(settings.listen) as channel:
                        await service.ready()
                        yield Serving(feature_pb2_grpc.FeatureServiceStub(channel), streams, settings)
                finally:
                    await server.stop(lame_duck_s=0, grace_s=1)


async def _each(requests: Sequence[pb.WriteEventsRequest]) -> AsyncIterator[pb.WriteEventsRequest]:
    for one in requests:
        yield one
