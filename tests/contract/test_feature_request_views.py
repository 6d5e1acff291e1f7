"""Features that are worked out while they are asked for, over real gRPC on rows in a real Valkey."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from services.feature.check.served import ServedLog, read
from services.feature.define.definition import Aggregate, DefinitionError, RequestView, Source, Value, View, windowed
from services.feature.define.definitions import Definitions
from services.feature.online.packed import NULL, OK
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from services.feature.onrequest import RequestViews
from services.feature.service import NAME, FeatureService
from services.feature.settings import FeatureSettings
from services.mesh.serve import Offer, Server
from tenfold.feature.v1 import feature_pb2 as pb
from tenfold.feature.v1 import feature_pb2_grpc

LONG_S = 10.0
EVENT_US = 1_384_000_000_000_000
ARRIVALS = Source("arrivals", "a/*.parquet", "at_us", "known_us", "seq", entities=("origin", "dest"), values=("delay",))
ORIGIN = View("origin", "origin", windowed(ARRIVALS, "delay", (Aggregate.MEAN, Aggregate.COUNT), ["1h"]))
DEST = View("dest", "dest", windowed(ARRIVALS, "delay", (Aggregate.MEAN,), ["1h"], default=-1.0))
CONNECTION = RequestView(
    "connection",
    inputs=("turnaround_min",),
    features=(
        Value("slack", "input.turnaround_min - origin.delay_mean_1h"),
        Value("worse_there", "dest.delay_mean_1h > origin.delay_mean_1h"),
    ),
)
DEFINITIONS = Definitions((ORIGIN, DEST), (CONNECTION,))


@contextlib.asynccontextmanager
async def serving(url: str, folder: Path) -> AsyncIterator[feature_pb2_grpc.FeatureServiceAsyncStub]:
    settings = FeatureSettings(
        mesh_file=folder / "tenfold.toml", listen=f"unix:{folder}/f.sock", instance="feature-0", store=url
    )
    async with Valkey(url) as valkey:
        await valkey.connected(LONG_S)
        store = OnlineStore(ValkeyTable(valkey), "test")
        await store.write(ORIGIN.schema(), ["JFK", "EWR"], EVENT_US, np.array([[12.5, 3.0], [np.nan, 0.0]]))
        await store.write(DEST.schema(), ["LAX"], EVENT_US + 7, np.array([[20.0]]))
        await store.publish([ORIGIN.schema(), DEST.schema()], EVENT_US, {"origin": 2, "dest": 1})
        served = ServedLog(folder / "served", 1.0, "feature-0")
        service = FeatureService(store, settings, request_views=RequestViews(DEFINITIONS), served=served)
        server = Server(
            settings.listen, [Offer(NAME, service, feature_pb2_grpc.add_FeatureServiceServicer_to_server)], "grpcio"
        )
        await server.start()
        async with service.fresh(), served.written(), grpc.aio.insecure_channel(settings.listen) as channel:
            await service.ready()
            await server.ready()
            yield feature_pb2_grpc.FeatureServiceStub(channel)
        await server.stop(lame_duck_s=0, grace_s=1)


@pytest.fixture
async def stub(valkey: str, folder: Path) -> AsyncIterator[feature_pb2_grpc.FeatureServiceAsyncStub]:
    async with serving(valkey, folder) as stub:
        yield stub


def asked(origins: list[str], dests: list[str], **inputs: list[float]) -> pb.GetFeaturesRequest:
    wanted = pb.RequestViewInputs(
        view="connection", inputs={name: pb.InputNumbers(values=numbers) for name, numbers in inputs.items()}
    )
    views = [pb.ViewKeys(view="origin", entity_ids=origins), pb.ViewKeys(view="dest", entity_ids=dests)]
    return pb.GetFeaturesRequest(views=[keys for keys in views if keys.entity_ids], request_views=[wanted])


async def test_inputs_and_stored_features_meet_in_one_row(stub: feature_pb2_grpc.FeatureServiceAsyncStub) -> None:
    request = asked(["JFK", "EWR", "JFK"], ["LAX", "LAX", "SFO"], turnaround_min=[45.0, 45.0, 30.0])
    rows = (await stub.GetFeatures(request, timeout=LONG_S)).views[2]
    values = np.frombuffer(rows.values, "<f4").reshape(3, 2)
    assert (rows.view, rows.columns) == ("connection", 2)
    # nothing is known of EWR's delay; SFO has no row, and its default counts
    assert np.frombuffer(rows.status, np.uint8).reshape(3, 2).tolist() == [[OK, OK], [NULL, NULL], [OK, OK]]
    assert values[0].tolist() == [32.5, 1.0]
    assert values[2].tolist() == [17.5, 0.0]
    assert np.isnan(values[1]).all()
    # as old as the older row, and of unknown age where one is missing
    assert np.frombuffer(rows.event_us, "<i8").tolist() == [EVENT_US, EVENT_US, 0]
    assert math.isnan(np.frombuffer(rows.age_s, "<f4")[2])


async def test_an_input_that_is_left_out_is_null_and_a_nan_is_not(
    stub: feature_pb2_grpc.FeatureServiceAsyncStub,
) -> None:
    without = (await stub.GetFeatures(asked(["JFK"], ["LAX"]), timeout=LONG_S)).views[2]
    assert list(without.status) == [NULL, OK]
    nan = (await stub.GetFeatures(asked(["JFK"], ["LAX"], turnaround_min=[math.nan]), timeout=LONG_S)).views[2]
    assert list(nan.status) == [OK, OK]


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (asked(["JFK"], [], turnaround_min=[1.0]), "must hold 'dest', which request view 'connection' reads"),
        (asked(["JFK"], ["LAX", "SFO"]), "must read views with the same number of rows, 1, got 2"),
        (asked(["JFK"], ["LAX"], turnaround_min=[1.0, 2.0]), "must hold 1 numbers, got 2"),
        (asked(["JFK"], ["LAX"], fuel=[1.0]), "must be of turnaround_min, got 'fuel'"),
    ],
)
async def test_inputs_that_do_not_fit_are_refused_by_name(
    stub: feature_pb2_grpc.FeatureServiceAsyncStub, request_: pb.GetFeaturesRequest, told: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetFeatures(request_, timeout=LONG_S)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert told in str(caught.value.details())


async def test_a_request_view_that_nobody_defined_is_not_found(stub: feature_pb2_grpc.FeatureServiceAsyncStub) -> None:
    request = pb.GetFeaturesRequest(request_views=[pb.RequestViewInputs(view="nope")])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetFeatures(request, timeout=LONG_S)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "'nope' is not defined; defined are: connection" in str(caught.value.details())


async def test_request_views_are_described_with_what_they_read(stub: feature_pb2_grpc.FeatureServiceAsyncStub) -> None:
    described = (await stub.DescribeViews(pb.DescribeViewsRequest(), timeout=LONG_S)).views
    assert [view.name for view in described] == ["dest", "origin", "connection"]
    assert list(described[2].columns) == ["slack", "worse_there"]
    assert (list(described[2].inputs), list(described[2].reads)) == (["turnaround_min"], ["origin", "dest"])


async def test_what_was_served_is_kept_for_the_check(valkey: str, folder: Path) -> None:
    async with serving(valkey, folder) as stub:
        answer = await stub.GetFeatures(asked(["JFK"], ["LAX"]), timeout=LONG_S)
    origin, dest = read(folder / "served")
    assert (origin.view, origin.entity_ids, dest.view, dest.entity_ids) == ("origin", ["JFK"], "dest", ["LAX"])
    assert (origin.values, origin.status) == (answer.views[0].values, answer.views[0].status)


def test_a_request_view_over_a_column_that_does_not_exist_is_refused_at_once() -> None:
    wrong = RequestView("connection", (), (Value("x", "origin.delay_mean_2h"),))
    with pytest.raises(DefinitionError, match=r"request view 'connection', column 'x'.*delay_mean_2h"):
        Definitions((ORIGIN,), (wrong,))
