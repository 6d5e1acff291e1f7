"""RouterService over real gRPC on both transports; behind it small real services and the real fallback service."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.fallback.service import FALLBACK_NAME, ROUTER_NAME, Fallbacks, FallbackServicer
from services.fallback.settings import FallbackSettings
from services.feature.define.schema import ViewSchema
from services.mesh import attributes, meshfile
from services.mesh.channels import open_channel
from services.mesh.serve import Offer, Server
from services.mesh.telemetry import NO_TRACING, Tracing
from services.resilience.breaker import State
from services.router.callees import Network
from services.router.predict import Predictor
from services.router.service import NAME, RouterServicer
from services.router.settings import RouterSettings
from tenfold.common.v1 import call_pb2
from tenfold.fallback.v1.fallback_pb2_grpc import add_FallbackServiceServicer_to_server
from tenfold.feature.v1.feature_pb2_grpc import add_FeatureServiceServicer_to_server
from tenfold.inference.v2.inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from tenfold.router.v1 import router_pb2 as pb
from tenfold.router.v1.router_pb2_grpc import RouterServiceStub, add_RouterServiceServicer_to_server
from tests.contract.standins import (
    AGE_S,
    COLUMNS,
    MESH,
    OUTPUT,
    FeatureStandin,
    InferenceStandin,
    right_answer,
    write_artefacts,
)

LONG_S = 20.0
CRITICAL = ((attributes.PRIORITY, "critical"),)
STANDARD = ((attributes.PRIORITY, "standard"),)
ENTITIES = {"route": "EWR-LAX", "tail": "N14228", "origin": "EWR"}
SAMPLED = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


def ask(
    entities: dict[str, str] | None = None, *, model: str = "delay", hour: float = 17.0, **more: object
) -> pb.PredictRequest:
    inputs = {"hour": pb.Value(number=hour)}
    return pb.PredictRequest(model=model, entities=ENTITIES if entities is None else entities, inputs=inputs, **more)  # type: ignore[arg-type]


@dataclasses.dataclass
class Mesh:
    """The router under test and everything around it."""

    feature: FeatureStandin
    inference: InferenceStandin
    fallbacks: Fallbacks
    egress: Server
    predictor: Predictor
    stub: RouterServiceStub
    channel: grpc.aio.Channel

    async def predict(
        self, request: pb.PredictRequest, metadata: object = STANDARD, timeout_s: float = LONG_S
    ) -> pb.PredictResponse:
        return await self.stub.Predict(request, metadata=metadata, timeout=timeout_s)  # type: ignore[misc, no-any-return]

    async def until(
        self, wanted: Callable[[pb.PredictResponse], bool], request: pb.PredictRequest
    ) -> pb.PredictResponse:
        """Asks again and again until the answer is as wanted."""
        async with asyncio.timeout(LONG_S):
            while True:
                answer = await self.predict(request)
                if wanted(answer):
                    return answer
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    transport: str = "grpcio",
    tracing: Tracing = NO_TRACING,
    planned: bool = True,
    described: str = MESH,
    **knobs: float,
) -> AsyncIterator[Mesh]:
    """A mesh of one router, stand-ins and the real fallback service.

    described: its mesh file. knobs: of RouterSettings.
    """
    write_artefacts(folder)
    (folder / "tenfold.toml").write_text(described)
    mesh = meshfile.load(folder / "tenfold.toml")
    at = {name: f"unix:{folder}/{name}" for name in ("egress", "router")}
    settings = RouterSettings(
        mesh_file=folder / "tenfold.toml",
        listen=at["router"],
        instance="router-0",
        egress=at["egress"],
        **{"shadow_every": 0, "remember_s": 1000.0, "open_s": 0.2} | knobs,  # type: ignore[arg-type]
    )
    fallback_settings = FallbackSettings(settings.mesh_file, "", "fallback-0", artefacts=folder)
    fallbacks = Fallbacks(mesh, fallback_settings)
    stand_in, feature, inference = FallbackServicer(fallbacks), FeatureStandin(), InferenceStandin()
    egress = Server(
        at["egress"],
        [
            Offer("tenfold.feature.v1.FeatureService", feature, add_FeatureServiceServicer_to_server),
            Offer("inference.GRPCInferenceService", inference, add_GRPCInferenceServiceServicer_to_server),
            Offer(ROUTER_NAME, stand_in, add_RouterServiceServicer_to_server),
            Offer(FALLBACK_NAME, stand_in, add_FallbackServiceServicer_to_server),
        ],
    )
    await egress.start()
    channel = open_channel(settings.egress, settings.channel)
    predictor = Predictor(mesh, settings, Network(channel, tracing, settings.callee_timeout_s, settings.breaker))
    servicer = RouterServicer(predictor, tracing, settings.predict_batch_max)
    router = Server(at["router"], [Offer(NAME, servicer, add_RouterServiceServicer_to_server)], transport)
    await router.start()
    upkeep = asyncio.create_task(predictor.run())
    client = grpc.aio.insecure_channel(at["router"])
    try:
        if planned:
            async with asyncio.timeout(LONG_S):
                await predictor.plans.complete.wait()
        yield Mesh(feature, inference, fallbacks, egress, predictor, RouterServiceStub(client), client)
    finally:
        feature.mood.open.set()
        inference.mood.open.set()
        upkeep.cancel()
        await asyncio.gather(upkeep, return_exceptions=True)
        await client.close()
        await router.stop(lame_duck_s=0, grace_s=1)
        await channel.close()
        await egress.stop(lame_duck_s=0, grace_s=0.1)


@pytest.fixture(params=["grpcio", "native"])
async def mesh(folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
    async with running(folder, request.param) as started:
        yield started


@pytest.fixture
async def one(folder: Path) -> AsyncIterator[Mesh]:
    """On one transport, for what does not depend on it."""
    async with running(folder) as started:
        yield started


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.005)


def good(answer: pb.PredictResponse) -> bool:
    return not answer.HasField("degradation")


async def failure(call: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call  # type: ignore[misc]
    return raised.value


# -- what it answers ------------------------------------------------------------------------------------------------


async def test_an_answer_says_who_gave_it_what_it_cost_and_how_fresh_its_features_were(mesh: Mesh) -> None:
    answer = await mesh.predict(ask(request_id="r-1"))
    assert answer.request_id == "r-1"
    assert [(output.name, list(output.values)) for output in answer.outputs] == [
        (OUTPUT, [right_answer("delay_small", ENTITIES, {"hour": 17})])
    ]
    served_by = answer.served_by
    assert (served_by.tier, served_by.model, served_by.model_version) == ("small", "delay_small", "1")
    assert served_by.provider == "CPUExecutionProvider"
    assert not answer.HasField("degradation")
    assert (answer.features.ok, answer.features.missing, answer.features.max_age_s) == (1, 0, AGE_S)
    assert answer.cost_usd == pytest.approx(0.0005)


async def test_priority_decides_how_good_a_tier_must_be(one: Mesh) -> None:
    tiers = [(await one.predict(ask(), metadata)).served_by.tier for metadata in (CRITICAL, STANDARD, ())]
    assert tiers == ["full", "small", "small"]


async def test_a_pinned_tier_answers_whatever_the_priority_needs(one: Mesh) -> None:
    answer = await one.predict(ask(tier="full"))
    assert answer.served_by.tier == "full"
    assert list(answer.outputs[0].values) == [right_answer("delay_full", ENTITIES, {"hour": 17})]
    low = await one.predict(ask(tier="small"), CRITICAL)
    assert (low.served_by.tier, low.HasField("degradation")) == ("small", False)


async def test_texts_and_nulls_reach_the_model(one: Mesh) -> None:
    request = ask(tier="full", hour=math.nan)
    request.inputs["kind"].text = "jet"
    answer = await one.predict(request)
    assert list(answer.outputs[0].values) == [right_answer("delay_full", ENTITIES, {}, {"kind": "jet"})]


async def test_two_hundred_distinct_requests_at_once_are_never_mixed_up(mesh: Mesh) -> None:
    asked = []
    for n in range(200):
        model, tier = (("delay", "full"), ("delay", "small"), ("bare", ""))[n % 3]
        entities = {"route": f"route-{n}", "tail": f"N{n}", "origin": ("EWR", "JFK", "LGA")[n % 3 - 1]}
        asked.append((model, tier, entities, float(n)))
    requests = [
        mesh.predict(ask(entities, model=model, tier=tier, hour=hour, request_id=str(hour)))
        for model, tier, entities, hour in asked
    ]
    answers = await asyncio.gather(*requests)
    for (model, tier, entities, hour), answer in zip(asked, answers, strict=True):
        served = {"full": "delay_full", "small": "delay_small", "": "bare_only"}[tier]
        assert answer.request_id == str(hour)
        assert not answer.HasField("degradation"), answer
        assert list(answer.outputs[0].values) == [right_answer(served, entities, {"hour": hour})], (model, tier, hour)
    assert max(mesh.feature.batch_sizes) > 1, "nothing travelled together: the test shows nothing"
    assert max(mesh.inference.batch_sizes) > 1


async def test_members_of_a_batch_answer_or_fail_each_for_itself(mesh: Mesh) -> None:
    requests = [ask(request_id="good"), ask(model="nothing"), ask(hour=math.inf), ask(tier="full")]
    batch = await mesh.stub.PredictBatch(pb.PredictBatchRequest(requests=requests), metadata=STANDARD, timeout=LONG_S)
    assert batch.results[0].response.request_id == "good"
    assert batch.results[1].failure.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert batch.results[2].failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "inputs[hour]" in batch.results[2].failure.message
    assert batch.results[3].response.served_by.tier == "full"


async def test_a_replay_asks_for_features_as_of_then_and_a_live_request_beside_it_as_of_now(one: Mesh) -> None:
    one.feature.mood.open.clear()
    blocked = []
    for calls in (1, 2):  # one after the other: side by side they might travel as one batch
        blocked.append(asyncio.ensure_future(one.predict(ask())))
        await eventually(lambda calls=calls: one.feature.mood.calls == calls)
    both = [asyncio.ensure_future(one.predict(ask(as_of_us=as_of))) for as_of in (1_384_000_000_000_000, 0)]
    await eventually(lambda: len(one.predictor.features) == 2)
    one.feature.mood.open.set()
    await asyncio.gather(*blocked, *both)
    assert one.feature.as_of_us[:2] == [[], []]
    then, now = sorted(one.feature.as_of_us[-1])
    assert then == 1_384_000_000_000_000
    assert now > 1_700_000_000_000_000


# -- features that are not there ------------------------------------------------------------------------------------


async def test_some_missing_features_leave_the_answer_good_and_are_counted(one: Mesh) -> None:
    entities = ENTITIES | {"tail": "new-1"}
    answer = await one.predict(ask(entities, tier="full"))
    assert not answer.HasField("degradation")
    assert (answer.features.ok, answer.features.missing, answer.features.expired) == (2, 2, 0)
    assert answer.features.max_age_s == AGE_S


async def test_null_and_expired_values_are_told_apart(one: Mesh) -> None:
    entities = ENTITIES | {"route": "EWR-quiet", "tail": "old-1"}
    answer = await one.predict(ask(entities, tier="full"))
    features = answer.features
    assert (features.ok, features.null, features.missing, features.expired) == (1, 1, 0, 2)
    assert features.max_age_s == AGE_S  # the expired row was not used


async def test_more_missing_than_the_model_may_have_is_degraded(one: Mesh) -> None:
    answer = await one.predict(ask(ENTITIES | {"route": "new-1", "tail": "old-1"}, tier="full"))
    assert answer.degradation.reason == call_pb2.REASON_FEATURES_UNAVAILABLE
    assert answer.degradation.source == "onnx"
    assert "100% of the values are missing or expired, at most 50% may be" in answer.degradation.detail


async def test_a_model_that_may_miss_everything_answers_without_the_feature_service_and_says_so(one: Mesh) -> None:
    one.feature.mood.fails = True
    answer = await one.predict(ask(model="bare"))
    assert (answer.degradation.reason, answer.degradation.source) == (call_pb2.REASON_FEATURES_UNAVAILABLE, "only")
    assert list(answer.outputs[0].values) == [0.0]
    assert (answer.features.ok, answer.features.missing) == (0, 2)


# -- what goes wrong ------------------------------------------------------------------------------------------------


async def test_inference_that_dies_with_calls_in_flight_leaves_every_answer_degraded_and_marked(mesh: Mesh) -> None:
    mesh.inference.mood.open.clear()
    calls = [mesh.stub.Predict(ask(), metadata=STANDARD, timeout=LONG_S) for _ in range(20)]
    answers = [asyncio.ensure_future(call.code()) for call in calls]
    await eventually(lambda: mesh.inference.mood.calls > 0)
    mesh.inference.mood.fails = True
    mesh.inference.mood.open.set()
    assert set(await asyncio.gather(*answers)) == {grpc.StatusCode.OK}
    for call in calls:
        answer = await call
        # five batches may have failed before the last was asked for: then it was not asked
        assert answer.degradation.reason in (call_pb2.REASON_DEPENDENCY_FAILED, call_pb2.REASON_CIRCUIT_OPEN)
        assert "inference" in answer.degradation.detail
        assert answer.degradation.source == "onnx"
        assert answer.outputs[0].values[0] == pytest.approx(0.67)
        trailers = await call.trailing_metadata()
        assert trailers[attributes.DEGRADED_REASON] in ("dependency_failed", "circuit_open")


async def test_a_feature_service_that_hangs_costs_an_answer_its_quality_but_not_its_deadline(mesh: Mesh) -> None:
    mesh.feature.mood.open.clear()
    answers = await asyncio.gather(*(mesh.predict(ask(), timeout_s=0.8) for _ in range(10)))
    assert {answer.degradation.reason for answer in answers} == {call_pb2.REASON_FEATURES_UNAVAILABLE}
    assert {answer.degradation.source for answer in answers} == {"onnx"}


async def test_a_callee_that_hangs_holds_a_patient_client_no_longer_than_the_routers_own_limit(folder: Path) -> None:
    async with running(folder, callee_timeout_s=0.2) as mesh:
        mesh.inference.mood.open.clear()
        answer = await mesh.predict(ask(), timeout_s=1000)
        assert answer.degradation.reason == call_pb2.REASON_DEADLINE


async def test_a_tier_without_room_is_replaced_by_a_lower_one_once(one: Mesh) -> None:
    one.inference.mood.refuses = {"delay_full"}
    answer = await one.predict(ask(), CRITICAL)
    assert answer.served_by.tier == "small"
    assert (answer.degradation.reason, answer.degradation.source) == (call_pb2.REASON_OVERLOADED, "small")
    assert list(answer.outputs[0].values) == [right_answer("delay_small", ENTITIES, {"hour": 17})]
    assert one.inference.asked == ["delay_full", "delay_small"]


async def test_when_the_lower_tier_has_no_room_either_fallback_answers(one: Mesh) -> None:
    one.inference.mood.refuses = {"delay_full", "delay_small"}
    answer = await one.predict(ask(), CRITICAL)
    assert (answer.degradation.reason, answer.degradation.source) == (call_pb2.REASON_OVERLOADED, "onnx")
    assert one.inference.asked == ["delay_full", "delay_small"]


async def test_a_pinned_tier_without_room_is_not_replaced_by_another(one: Mesh) -> None:
    one.inference.mood.refuses = {"delay_full"}
    answer = await one.predict(ask(tier="full"))
    assert answer.degradation.source == "onnx"
    assert one.inference.asked == ["delay_full"]


async def test_sheds_never_open_the_breaker(one: Mesh) -> None:
    one.inference.mood.refuses = {"delay_small"}
    for _ in range(30):
        await one.predict(ask())
    one.inference.mood.refuses = set()
    assert not (await one.predict(ask())).HasField("degradation")


async def test_the_breaker_opens_spares_the_callee_and_closes_when_it_is_well_again(folder: Path) -> None:
    async with running(folder, open_s=1.0) as mesh:
        mesh.inference.mood.fails = True
        reasons = [(await mesh.predict(ask(tier="small"))).degradation.reason for _ in range(8)]
        assert reasons == [call_pb2.REASON_DEPENDENCY_FAILED] * 5 + [call_pb2.REASON_CIRCUIT_OPEN] * 3
        assert len(mesh.inference.asked) == 5
        mesh.inference.mood.fails = False
        await mesh.until(good, ask(tier="small"))
        await mesh.until(
            lambda _: mesh.predictor.breakers()["inference/delay_small"] is State.CLOSED, ask(tier="small")
        )


async def test_one_tiers_open_breaker_leaves_the_better_one_in_use(one: Mesh) -> None:
    one.inference.mood.fails = True
    for _ in range(5):
        await one.predict(ask(tier="small"))
    one.inference.mood.fails = False
    answer = await one.predict(ask())
    assert (answer.served_by.tier, answer.HasField("degradation")) == ("full", False)


async def test_without_any_service_behind_it_the_end_names_both_reasons(mesh: Mesh) -> None:
    await mesh.egress.stop(lame_duck_s=0, grace_s=0)
    error = await failure(mesh.predict(ask()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "feature" in str(error.details())
    assert "fallback" in str(error.details())


async def test_a_model_without_fallbacks_fails_as_what_it_needs_fails(one: Mesh) -> None:
    one.inference.mood.fails = True
    error = await failure(one.predict(ask(model="bare")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "it is down" in str(error.details())
    one.inference.mood.fails, one.inference.mood.refuses = False, {"bare_only"}
    error = await failure(one.predict(ask(model="bare")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_client_that_goes_away_takes_its_waiting_and_running_work_with_it(mesh: Mesh) -> None:
    mesh.feature.mood.open.clear()
    calls = [mesh.stub.Predict(ask(), metadata=STANDARD, timeout=LONG_S) for _ in range(3)]
    await eventually(lambda: mesh.feature.mood.calls > 0)
    for call in calls:
        call.cancel()
    await eventually(lambda: mesh.feature.mood.cancelled == mesh.feature.mood.calls)
    await eventually(lambda: len(mesh.predictor.features) == 0)
    mesh.feature.mood.open.set()
    assert not (await mesh.predict(ask())).HasField("degradation")
    assert len(mesh.inference.asked) == 1


async def test_a_deadline_too_short_for_the_tier_that_is_needed_gets_the_best_that_is_in_time(folder: Path) -> None:
    async with running(folder, described=MESH.replace("expected_ms = 10", "expected_ms = 100000")) as mesh:
        answer = await mesh.predict(ask(), CRITICAL)
        assert (answer.served_by.tier, answer.degradation.source) == ("small", "small")
        assert answer.degradation.reason == call_pb2.REASON_DEADLINE


# -- plans ----------------------------------------------------------------------------------------------------------


async def test_before_anything_is_known_of_a_model_fallback_answers(folder: Path) -> None:
    async with running(folder, planned=False, described=MESH.replace('model = "delay_', 'model = "other_')) as mesh:
        answer = await mesh.predict(ask())
        assert answer.degradation.source == "onnx"
        assert "no tier of 'delay' can be served" in answer.degradation.detail


async def test_a_new_version_with_other_columns_is_adopted_without_a_wrong_answer(one: Mesh) -> None:
    columns = tuple(reversed(one.inference.columns["delay_small", "1"]))
    one.inference.columns["delay_small", "2"] = columns
    one.inference.versions["delay_small"] = ["2"]  # version 1 is gone at once

    def adopted(answer: pb.PredictResponse) -> bool:
        if good(answer):
            assert list(answer.outputs[0].values) == [right_answer("delay_small", ENTITIES, {"hour": 17})]
        return good(answer) and answer.served_by.model_version == "2"

    await one.until(adopted, ask(tier="small"))


async def test_features_that_are_worked_out_on_request_reach_the_model_row_by_row(
    one: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ("gap.headwind", "input.hour", "route.flights")  # tail is read by the view alone
    monkeypatch.setitem(COLUMNS, "delay_full", columns)
    one.feature.has_gap = True
    one.inference.columns["delay_full", "2"] = columns
    one.inference.versions["delay_full"] = ["2"]
    await one.until(lambda answer: good(answer) and answer.served_by.model_version == "2", windy(0))
    one.feature.batch_sizes.clear()
    wanted = [windy(n) if n % 3 else ask(request_id=str(n)) for n in range(60)]  # others are of another tier
    answers = await asyncio.gather(*(one.predict(request) for request in wanted))
    for n, answer in enumerate(answers):
        assert good(answer), answer
        model, numbers = ("delay_full", {"hour": 17, "wind": n}) if n % 3 else ("delay_small", {"hour": 17})
        entities = {**ENTITIES, "tail": f"N{n}"} if n % 3 else ENTITIES
        assert list(answer.outputs[0].values) == [right_answer(model, entities, numbers)], n
    assert max(one.feature.batch_sizes) > 1, "nothing travelled together: the test shows nothing"


def windy(n: int) -> pb.PredictRequest:
    request = ask({**ENTITIES, "tail": f"N{n}"}, tier="full")
    request.inputs["wind"].number = n
    return request


async def test_a_changed_schema_is_learnt_and_never_guessed(one: Mesh) -> None:
    one.feature.views["route"] = ViewSchema("route", "route", ("distance", "late", "flights"))
    assert (await one.predict(ask())).degradation.reason == call_pb2.REASON_FEATURES_UNAVAILABLE
    answer = await one.until(good, ask())
    assert list(answer.outputs[0].values) == [right_answer("delay_small", ENTITIES, {"hour": 17})]


async def test_a_tier_whose_model_is_gone_is_left_out_until_it_is_back(one: Mesh) -> None:
    one.inference.versions.pop("delay_small")
    answer = await one.until(lambda answer: answer.served_by.tier == "full", ask())
    assert not answer.HasField("degradation")


# -- what travels along ---------------------------------------------------------------------------------------------


async def test_every_hop_learns_who_is_calling_and_for_how_long(one: Mesh) -> None:
    metadata = ((attributes.PRIORITY, "critical"), (attributes.TENANT, "acme"), (attributes.COHORT, "7"))
    await one.predict(ask(), metadata)
    for callee in (one.feature, one.inference):
        (caller,) = callee.mood.callers
        assert (caller.priority.label, caller.tenant, caller.cohort) == ("critical", "acme", "7")
        assert caller.deadline < math.inf


async def test_a_sampled_request_leaves_one_span_for_each_call_and_callees_join_their_trace(folder: Path) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("router", "router-0", exporter)
    async with running(folder, tracing=tracing) as mesh:
        await mesh.predict(ask())
        await mesh.predict(ask(), (*STANDARD, (attributes.TRACEPARENT, SAMPLED)))
        mesh.inference.mood.fails = True
        await mesh.predict(ask(), (*STANDARD, (attributes.TRACEPARENT, SAMPLED)))
        tracing.close()
        spans = exporter.get_finished_spans()
        joined = [
            caller.traceparent.split("-")[2]
            for caller in mesh.feature.mood.callers + mesh.inference.mood.callers
            if caller.traceparent
        ]
    names = [span.name for span in spans]
    assert names.count("tenfold.router.v1.RouterService/Predict") == 3  # two served, one asked of fallback
    assert names.count("tenfold.feature.v1.FeatureService/GetFeatures") == 2
    assert names.count("inference.GRPCInferenceService/ModelInfer") == 2
    infer = next(span for span in spans if span.name.endswith("ModelInfer"))
    assert infer.attributes is not None
    assert infer.attributes[attributes.TIER] == "small"
    assert infer.attributes[attributes.BATCH_SIZE] == 1
    clients = {f"{span.context.span_id:016x}" for span in spans if span.kind.name == "CLIENT" and span.context}
    assert set(joined) <= clients
    assert len(joined) == 4
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {SAMPLED.split("-")[1]}


async def test_good_answers_are_repeated_when_the_model_is_gone(one: Mesh) -> None:
    good = await one.predict(ask(), CRITICAL)
    await one.predictor.remember.send()
    assert (one.predictor.remember.sent, one.predictor.remember.dropped) == (1, 0)
    one.inference.mood.fails = True
    answer = await one.predict(ask(), CRITICAL)
    assert answer.outputs == good.outputs
    assert answer.degradation.source == "last_good"
    assert (answer.served_by.tier, answer.served_by.model) == ("", "delay_full")


async def test_degraded_answers_are_not_remembered(one: Mesh) -> None:
    one.inference.mood.fails = True
    await one.predict(ask())
    await one.predictor.remember.send()
    assert one.predictor.remember.sent == 0


async def test_good_answers_that_cannot_be_sent_are_dropped_and_counted(one: Mesh) -> None:
    await one.predict(ask())
    await one.egress.stop(lame_duck_s=0, grace_s=0)
    await one.predictor.remember.send()
    assert (one.predictor.remember.sent, one.predictor.remember.dropped) == (0, 1)


async def test_one_live_request_in_so_many_also_goes_to_fallback(folder: Path) -> None:
    async with running(folder, shadow_every=10) as mesh:
        for _ in range(25):
            assert not (await mesh.predict(ask())).HasField("degradation")
        await eventually(lambda: mesh.predictor.shadow.answered == 2)
        assert (mesh.predictor.shadow.sent, mesh.predictor.shadow.failed) == (2, 0)


async def test_as_a_process_it_serves_even_alone_and_ends_clean(folder: Path) -> None:
    (folder / "tenfold.toml").write_text(MESH)
    environ = {
        "TENFOLD_MESH_FILE": str(folder / "tenfold.toml"),
        "TENFOLD_LISTEN": f"unix:{folder}/router",
        "TENFOLD_INSTANCE": "router-0",
        "TENFOLD_EGRESS": f"unix:{folder}/nobody",
        "TENFOLD_READY_WAIT_S": "0.2",
        "TENFOLD_LAME_DUCK_S": "0",
    }
    command = (sys.executable, "-m", "services.router")
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(*command, cwd=root, env=environ, stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(LONG_S), grpc.aio.insecure_channel(f"unix:{folder}/router") as channel:
            call = RouterServiceStub(channel).Predict(ask(), wait_for_ready=True, timeout=LONG_S)
            error = await failure(call)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "no tier of 'delay' can be served" in str(error.details())
            assert "fallback" in str(error.details())
            process.terminate()
            _, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, stderr.decode()
    events = [json.loads(line)["event"] for line in stderr.decode().splitlines()]
    assert (events[0], events[-1]) == ("listening", "stopped")


# -- explain --------------------------------------------------------------------------------------------------------


async def test_explain_tells_the_choice_and_calls_no_model(mesh: Mesh) -> None:
    explained = await mesh.stub.Explain(pb.ExplainRequest(request=ask()), metadata=CRITICAL, timeout=LONG_S)
    assert (explained.tier, explained.required_quality) == ("full", 0.8)
    small, full = explained.tiers
    assert (small.tier, small.chosen, small.why) == ("small", False, "its quality 0.7 is below 0.8")
    assert (full.tier, full.chosen, full.model, full.cost_usd) == ("full", True, "delay_full", 0.002)
    assert mesh.inference.asked == []
    assert mesh.feature.mood.calls == 0


# -- bad input ------------------------------------------------------------------------------------------------------

LONG_TEXT = "x" * 257
BAD: list[tuple[str, pb.PredictRequest, grpc.StatusCode, str]] = [
    (
        "no model",
        ask(model=""),
        grpc.StatusCode.INVALID_ARGUMENT,
        "model: must name a model, got ''; there are bare, delay",
    ),
    ("unknown model", ask(model="dealy"), grpc.StatusCode.NOT_FOUND, "no model 'dealy'; there are bare, delay"),
    (
        "unknown tier",
        ask(tier="huge"),
        grpc.StatusCode.NOT_FOUND,
        "model 'delay' has no tier 'huge'; it has small, full",
    ),
    (
        "missing entity",
        ask({"route": "a"}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "entities[tail]: must be given: view 'tail'",
    ),
    (
        "empty id",
        ask(ENTITIES | {"tail": ""}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "entities[tail]: must be an id of 1 byte",
    ),
    (
        "long id",
        ask(ENTITIES | {"tail": LONG_TEXT}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "entities[tail]: must be at most 256 bytes, got 257",
    ),
    (
        "wide id",
        ask(ENTITIES | {"tail": "é" * 129}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "entities[tail]: must be at most 256 bytes, got 258",
    ),
    (
        "nameless entity",
        ask(ENTITIES | {"": "a"}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "entities: names must have 1 byte or more",
    ),
    (
        "long entity name",
        ask(ENTITIES | {"n" * 65: "a"}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "entities: names must be at most 64 bytes, got 65",
    ),
    (
        "too many entities",
        ask({f"e{i}": "a" for i in range(65)}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "entities: must be at most 64, got 65",
    ),
    (
        "infinite number",
        ask(hour=math.inf),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs[hour]: must be NaN for null or a number that fits float32, got inf",
    ),
    (
        "too large a number",
        ask(hour=-1e39),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs[hour]: must be NaN for null or a number that fits float32, got -1e+39",
    ),
    (
        "long request id",
        ask(request_id="r" * 129),
        grpc.StatusCode.INVALID_ARGUMENT,
        "request_id: must be at most 128 bytes, got 129",
    ),
    (
        "negative time",
        ask(as_of_us=-1),
        grpc.StatusCode.INVALID_ARGUMENT,
        "as_of_us: must be at least 0 (0 means now), got -1",
    ),
]


def with_input(name: str, value: pb.Value) -> pb.PredictRequest:
    request = ask()
    request.inputs[name].CopyFrom(value)
    return request


BAD += [
    (
        "text for a number",
        with_input("hour", pb.Value(text="five")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs[hour]: must be a number, got text 'five'",
    ),
    (
        "number for a text",
        with_input("kind", pb.Value(number=5)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs[kind]: must be a text, got number 5.0",
    ),
    (
        "neither kind",
        with_input("kind", pb.Value()),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs[kind]: must have a number or a text, got neither",
    ),
    (
        "long text",
        with_input("kind", pb.Value(text=LONG_TEXT)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs[kind]: must be at most 256 bytes, got 257",
    ),
    (
        "long input name",
        with_input("n" * 65, pb.Value(number=1)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs: names must be at most 64 bytes, got 65",
    ),
    (
        "too many inputs",
        pb.PredictRequest(model="delay", inputs={f"i{i}": pb.Value(number=i) for i in range(257)}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "inputs: must be at most 256, got 257",
    ),
]


async def test_bad_input_is_named_with_its_value_and_what_is_allowed_and_never_goes_to_fallback(mesh: Mesh) -> None:
    for name, request, code, message in BAD:
        for call in (
            mesh.stub.Predict(request, metadata=STANDARD, timeout=LONG_S),
            mesh.stub.Explain(pb.ExplainRequest(request=request), metadata=STANDARD, timeout=LONG_S),
        ):
            error = await failure(call)
            assert error.code() is code, (name, error)
            assert message in str(error.details()), name
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            assert message.partition(":")[0] in violated(error), name
        batch = await mesh.stub.PredictBatch(
            pb.PredictBatchRequest(requests=[request]), metadata=STANDARD, timeout=LONG_S
        )
        assert batch.results[0].failure.code == code.value[0], name
        assert message in batch.results[0].failure.message, name
    assert mesh.feature.mood.calls == 0


def violated(error: grpc.aio.AioRpcError) -> list[str]:
    details = error.trailing_metadata()["grpc-status-details-bin"]
    detail = error_details_pb2.BadRequest()
    assert status_pb2.Status.FromString(details).details[0].Unpack(detail)  # type: ignore[arg-type]
    return [violation.field for violation in detail.field_violations]


@pytest.mark.parametrize("count", [0, 257])
async def test_a_batch_of_none_or_of_too_many_is_refused_as_a_whole(mesh: Mesh, count: int) -> None:
    error = await failure(mesh.stub.PredictBatch(pb.PredictBatchRequest(requests=[ask()] * count), timeout=LONG_S))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"requests: must be 1 to 256 requests, got {count}" in str(error.details())


async def test_bad_input_by_the_hundred_is_reported_in_part_so_that_the_report_arrives(mesh: Mesh) -> None:
    error = await failure(mesh.predict(ask({f"entity-{i}": LONG_TEXT for i in range(64)})))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(violated(error)) == 8
