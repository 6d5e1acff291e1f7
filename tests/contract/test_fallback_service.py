"""The fallback service over real gRPC on both transports, and as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from services.fallback.service import FALLBACK_NAME, ROUTER_NAME, Fallbacks, FallbackServicer
from services.fallback.settings import FallbackSettings
from services.mesh import attributes, meshfile
from services.mesh.serve import Offer, Server
from tenfold.common.v1 import call_pb2
from tenfold.fallback.v1 import fallback_pb2
from tenfold.fallback.v1.fallback_pb2_grpc import FallbackServiceStub, add_FallbackServiceServicer_to_server
from tenfold.router.v1 import router_pb2 as pb
from tenfold.router.v1.router_pb2_grpc import RouterServiceStub, add_RouterServiceServicer_to_server
from tests.contract.standins import MESH, OUTPUT, write_artefacts

LONG_S = 20.0
NOW_US = 1_700_000_000_000_000
ROOT = Path(__file__).parents[2]


class Running:
    def __init__(self, fallbacks: Fallbacks, channel: grpc.aio.Channel) -> None:
        self.fallbacks = fallbacks
        self.router, self.fallback = RouterServiceStub(channel), FallbackServiceStub(channel)

    async def predict(self, request: pb.PredictRequest, *metadata: tuple[str, str]) -> pb.PredictResponse:
        return await self.router.Predict(request, metadata=metadata, timeout=LONG_S)  # type: ignore[misc, no-any-return]

    async def remember(self, *answers: fallback_pb2.GoodAnswer) -> int:
        request = fallback_pb2.RememberRequest(answers=answers)
        return (await self.fallback.Remember(request, timeout=LONG_S)).kept  # type: ignore[misc, no-any-return]


@pytest.fixture
def folder(folder: Path) -> Path:
    (folder / "tenfold.toml").write_text(MESH)
    return folder


@contextlib.asynccontextmanager
async def running(folder: Path, transport: str = "grpcio", **knobs: int) -> AsyncIterator[Running]:
    settings = FallbackSettings(
        folder / "tenfold.toml",
        f"unix:{folder}/fallback",
        "fallback-0",
        artefacts=folder,
        **knobs,  # type: ignore[arg-type]
    )
    fallbacks = Fallbacks(meshfile.load(settings.mesh_file), settings, lambda: NOW_US)
    servicer = FallbackServicer(fallbacks)
    offers = [
        Offer(ROUTER_NAME, servicer, add_RouterServiceServicer_to_server),
        Offer(FALLBACK_NAME, servicer, add_FallbackServiceServicer_to_server),
    ]
    server = Server(settings.listen, offers, transport)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(settings.listen) as channel:
            yield Running(fallbacks, channel)
    finally:
        await server.stop(lame_duck_s=0, grace_s=0)


@pytest.fixture(params=["grpcio", "native"])
async def service(folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    write_artefacts(folder)
    async with running(folder, request.param) as started:
        yield started


def ask(route: str = "a", model: str = "delay", **more: object) -> pb.PredictRequest:
    entities = {"route": route, "origin": "EWR"}
    return pb.PredictRequest(model=model, entities=entities, inputs={"hour": pb.Value(number=17)}, **more)  # type: ignore[arg-type]


def good(
    route: str = "a", value: float = 0.75, answered_us: int = NOW_US - 9_000_000, **more: object
) -> fallback_pb2.GoodAnswer:
    parts = {
        "model": "delay",
        "outputs": [pb.Output(name=OUTPUT, values=[value])],
        "served_by": pb.ServedBy(tier="full", model="delay_full", model_version="3"),
    }
    return fallback_pb2.GoodAnswer(entity_id=route, answered_us=answered_us, **parts | more)  # type: ignore[arg-type]


async def failure(call: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call  # type: ignore[misc]
    return raised.value


async def test_an_answer_is_marked_with_why_what_and_how_old(service: Running) -> None:
    assert await service.remember(good()) == 1
    call = service.router.Predict(
        ask(request_id="r"), metadata=((attributes.DEGRADED_REASON, "circuit_open"),), timeout=LONG_S
    )
    answer = await call
    assert answer.request_id == "r"
    assert list(answer.outputs[0].values) == [0.75]
    degradation = answer.degradation
    assert (degradation.reason, degradation.source, degradation.age_s) == (
        call_pb2.REASON_CIRCUIT_OPEN,
        "last_good",
        9.0,
    )
    assert degradation.detail == "the last good answer for route a"
    assert (answer.served_by.tier, answer.served_by.model, answer.served_by.model_version) == ("", "delay_full", "3")
    assert (await call.trailing_metadata())[attributes.DEGRADED_REASON] == "circuit_open"


async def test_who_comes_without_a_reason_comes_because_no_router_was_left(service: Running) -> None:
    answer = await service.predict(ask())
    assert answer.degradation.reason == call_pb2.REASON_ROUTER_UNREACHABLE


async def test_the_list_is_followed_from_its_front(service: Running, folder: Path) -> None:
    await service.remember(good("known"))
    sources = [(await service.predict(ask(route))).degradation.source for route in ("known", "unknown")]
    assert sources == ["last_good", "onnx"]
    small = await service.predict(ask("unknown"))
    assert list(small.outputs[0].values) == pytest.approx([0.67])
    assert small.cost_usd == pytest.approx(0.0001)


async def test_a_batch_answers_each_for_itself(service: Running) -> None:
    await service.remember(good("a", 0.25), good("b", 0.5))
    requests = [ask("b"), ask(model="nothing"), ask("a"), ask(as_of_us=-1), ask("c")]
    batch = await service.router.PredictBatch(pb.PredictBatchRequest(requests=requests), timeout=LONG_S)
    assert [list(batch.results[i].response.outputs[0].values) for i in (0, 2)] == [[0.5], [0.25]]
    assert batch.results[1].failure.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert batch.results[3].failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert batch.results[4].response.degradation.source == "onnx"


async def test_explain_says_that_it_is_fallback(service: Running) -> None:
    explained = await service.router.Explain(pb.ExplainRequest(request=ask()), timeout=LONG_S)
    assert explained.tier == ""
    assert {verdict.why for verdict in explained.tiers} == {
        "this is the fallback service, which runs no tier; it answers by last_good, onnx, prior"
    }


async def test_missing_artefacts_are_skipped_with_one_line_each(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "services.fallback")
    write_artefacts(folder)
    (folder / "small.onnx").unlink()
    async with running(folder) as service:
        assert (await service.predict(ask())).degradation.source == "prior"
    (record,) = caplog.records
    assert record.message == "fallback skipped"
    assert vars(record)["why"] == f"there is no file {folder / 'small.onnx'}"


async def test_without_any_answer_left_a_model_is_unavailable(folder: Path) -> None:
    async with running(folder) as service:
        error = await failure(service.predict(ask()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "no answer of model 'delay' for this request" in str(error.details())
        assert (await failure(service.predict(ask(model="bare")))).code() is grpc.StatusCode.UNAVAILABLE
        await service.remember(good())
        assert (await service.predict(ask())).degradation.source == "last_good"


async def test_more_requests_than_there_is_room_for_are_refused_at_once(folder: Path) -> None:
    write_artefacts(folder)
    async with running(folder, max_waiting=10, max_batch=4) as service:
        request = pb.PredictBatchRequest(requests=[ask() for _ in range(50)])
        batch = await service.router.PredictBatch(request, timeout=LONG_S)
        kinds = [result.WhichOneof("kind") for result in batch.results]
        assert kinds == ["response"] * 10 + ["failure"] * 40
        refused = batch.results[-1].failure
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert refused.reason == call_pb2.REASON_QUEUE_FULL
        assert (await service.predict(ask())).degradation.source == "onnx"


BAD = [
    ("no model", ask(model=""), grpc.StatusCode.INVALID_ARGUMENT, "model: must name a model"),
    ("unknown model", ask(model="dealy"), grpc.StatusCode.NOT_FOUND, "no model 'dealy'; there are bare, delay"),
    ("unknown tier", ask(tier="huge"), grpc.StatusCode.NOT_FOUND, "has no tier 'huge'"),
    (
        "long id",
        ask("x" * 257),
        grpc.StatusCode.INVALID_ARGUMENT,
        "entities[route]: must be at most 256 bytes, got 257",
    ),
    (
        "long request id",
        ask(request_id="r" * 129),
        grpc.StatusCode.INVALID_ARGUMENT,
        "request_id: must be at most 128 bytes",
    ),
    ("negative time", ask(as_of_us=-1), grpc.StatusCode.INVALID_ARGUMENT, "as_of_us: must be at least 0"),
    (
        "infinite number",
        pb.PredictRequest(model="delay", inputs={"hour": pb.Value(number=-math.inf)}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs[hour]: must be NaN for null or a number that fits float32, got -inf",
    ),
    (
        "neither kind",
        pb.PredictRequest(model="delay", inputs={"hour": pb.Value()}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs[hour]: must have a number or a text, got neither",
    ),
]


async def test_bad_input_is_named_with_its_value_and_what_is_allowed(service: Running) -> None:
    for name, request, code, message in BAD:
        for call in (
            service.predict(request),
            service.router.Explain(pb.ExplainRequest(request=request), timeout=LONG_S),
        ):
            error = await failure(call)
            assert (error.code(), message in str(error.details())) == (code, True), (name, error)


@pytest.mark.parametrize("count", [0, 257])
async def test_a_batch_of_none_or_of_too_many_is_refused_as_a_whole(service: Running, count: int) -> None:
    error = await failure(service.router.PredictBatch(pb.PredictBatchRequest(requests=[ask()] * count), timeout=LONG_S))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"requests: must be 1 to 256 requests, got {count}" in str(error.details())


async def test_remember_keeps_only_what_could_be_repeated(service: Running) -> None:
    kept = [
        await service.remember(answer)
        for answer in (
            good(),
            good(answered_us=NOW_US - 10_000_000),  # older than what is there
            good("b", model="nothing"),
            good("b", model="bare"),  # repeats no answers
            good(""),
            good("x" * 257),
            good("b", math.nan),
            good("b", outputs=[]),
            good("b", answered_us=0),
            good("b", answered_us=NOW_US + 60_000_000),  # from the future
        )
    ]
    assert kept == [1] + [0] * 9
    assert await service.remember() == 0


async def test_more_good_answers_than_a_call_may_carry_are_refused(service: Running) -> None:
    error = await failure(service.remember(*[good()] * 4097))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "answers: must be at most 4096, got 4097" in str(error.details())


async def started(name: str, environ: dict[str, str]) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", f"services.{name}")
    return await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environ, stderr=asyncio.subprocess.PIPE)


@pytest.mark.parametrize("name", ["fallback", "router"])
@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"TENFOLD_LISTEN": None}, "TENFOLD_LISTEN must be set"),
        ({"TENFOLD_MESH_FILE": "/nowhere/tenfold.toml"}, "/nowhere/tenfold.toml: No such file or directory"),
        ({"TENFOLD_MAX_WAITING": "0"}, "TENFOLD_MAX_WAITING must be at least 1, got 0"),
    ],
)
async def test_a_process_that_cannot_start_says_why_in_one_line(
    folder: Path, name: str, wrong: dict[str, str | None], line: str
) -> None:
    environ = environ_of(folder) | wrong
    process = await started(name, {key: value for key, value in environ.items() if value is not None})
    async with asyncio.timeout(LONG_S):
        _, stderr = await process.communicate()
    assert process.returncode == 2
    assert stderr.decode() == f"services.{name}: {line}\n"


async def test_as_a_process_it_serves_repeats_what_it_was_told_and_ends_clean(folder: Path) -> None:
    write_artefacts(folder)
    process = await started("fallback", environ_of(folder))
    try:
        async with asyncio.timeout(LONG_S), grpc.aio.insecure_channel(f"unix:{folder}/service") as channel:
            fallback, router = FallbackServiceStub(channel), RouterServiceStub(channel)
            request = fallback_pb2.RememberRequest(answers=[good(answered_us=time.time_ns() // 1000)])
            assert (await fallback.Remember(request, wait_for_ready=True, timeout=LONG_S)).kept == 1
            answer = await router.Predict(ask(), timeout=LONG_S)
            assert answer.degradation.source == "last_good"
            process.terminate()
            _, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    events = [json.loads(text)["event"] for text in stderr.decode().splitlines() if text.startswith("{")]
    assert events == ["listening", "serving", "draining", "stopped"]


def environ_of(folder: Path) -> dict[str, str | None]:
    return {
        "TENFOLD_MESH_FILE": str(folder / "tenfold.toml"),
        "TENFOLD_LISTEN": f"unix:{folder}/service",
        "TENFOLD_INSTANCE": "one-0",
        "TENFOLD_EGRESS": f"unix:{folder}/egress",
        "TENFOLD_ARTEFACTS": str(folder),
        "TENFOLD_LAME_DUCK_S": "0",
    }
