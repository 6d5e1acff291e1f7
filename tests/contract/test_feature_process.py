"""The feature service as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.feature.define.schema import ViewSchema
from services.feature.online.store import OnlineStore
from services.feature.online.valkey import Valkey
from services.feature.online.valkey_table import ValkeyTable
from tenfold.feature.v1 import feature_pb2 as pb
from tenfold.feature.v1 import feature_pb2_grpc
from tests.conftest import ValkeyProcess

LONG_S = 20.0
MESH_FILE = Path(__file__).parents[2] / "deploy" / "flights" / "tenfold.toml"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@contextlib.asynccontextmanager
async def started(environ: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    command = (sys.executable, "-m", "services.feature")
    process = await asyncio.create_subprocess_exec(
        *command, cwd=MESH_FILE.parents[2], env=environ, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def health_becomes(channel: grpc.aio.Channel, wanted: int) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(LONG_S):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=LONG_S)
                if answer.status == wanted:
                    return
            await asyncio.sleep(0.02)


async def test_it_waits_for_its_store_serves_and_stops_clean(folder: Path, valkey_process: ValkeyProcess) -> None:
    valkey_process.kill()
    environ = {
        "TENFOLD_MESH_FILE": str(MESH_FILE),
        "TENFOLD_LISTEN": f"unix:{folder}/f.sock",
        "TENFOLD_INSTANCE": "feature-0",
        "TENFOLD_STORE": valkey_process.url,
        "TENFOLD_DIE_WITH_PARENT": "1",
        "TENFOLD_LAME_DUCK_S": "0",
    }
    async with started(environ) as process, grpc.aio.insecure_channel(environ["TENFOLD_LISTEN"]) as channel:
        await health_becomes(channel, NOT_SERVING)
        valkey_process.start()
        await health_becomes(channel, SERVING)

        schema = ViewSchema("route", "route", ("late",))
        async with Valkey(valkey_process.url) as client:
            await client.connected(LONG_S)
            store = OnlineStore(ValkeyTable(client), "flights")
            await store.write(schema, ["JFK-LAX"], 1_384_000_000_000_000, np.array([[0.5]]))
            await store.publish([schema], 1_384_000_000_000_000, {"route": 1})
        stub = feature_pb2_grpc.FeatureServiceStub(channel)
        request = pb.GetFeaturesRequest(views=[pb.ViewKeys(view="route", entity_ids=["JFK-LAX"])])
        async with asyncio.timeout(LONG_S):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await stub.GetFeatures(request, timeout=LONG_S)
                    break
                await asyncio.sleep(0.02)
        assert np.frombuffer(answer.views[0].values, "<f4").tolist() == [0.5]

        process.send_signal(signal.SIGTERM)
        _, told = await asyncio.wait_for(process.communicate(), LONG_S)
        assert process.returncode == 0, told.decode()
        assert '"event": "stopped"' in told.decode().splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"TENFOLD_STORE": "http://store"}, "TENFOLD_STORE: the store's URL must be unix:///path"),
        ({"TENFOLD_MESH_FILE": "nowhere.toml"}, "nowhere.toml: No such file or directory"),
    ],
)
async def test_settings_that_cannot_be_used_are_one_line_and_status_2(changed: dict[str, str], told: str) -> None:
    environ = {
        "TENFOLD_MESH_FILE": str(MESH_FILE),
        "TENFOLD_LISTEN": "unix:/tmp/unused",
        "TENFOLD_INSTANCE": "feature-0",
        "TENFOLD_STORE": "redis://store",
    }
    async with started(environ | changed) as process:
        _, output = await asyncio.wait_for(process.communicate(), LONG_S)
    assert process.returncode == 2
    assert output.decode().startswith(f"services.feature: {told}")
    assert len(output.decode().splitlines()) == 1
