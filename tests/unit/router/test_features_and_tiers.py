"""Answers of callees that are not what was asked for, and calls that are shared."""

from __future__ import annotations

import asyncio
import math

import grpc
import numpy as np
import pytest

from services.mesh import meshfile
from services.mesh.errors import CalleeError
from services.mesh.query import Query, models_of
from services.resilience.call import Call, Caller
from services.resilience.coalesce import Limits
from services.resilience.errors import CallError, DeadlineExceeded, Reason, Refused, Unavailable
from services.router.features import GET, Features, Wanted
from services.router.plan import TierPlan, ViewShape, make_plan
from services.router.standby import PREDICT, PREDICT_BATCH, Standby
from services.router.tiers import INFER, TierBusy, TierRunner
from tenfold.feature.v1 import feature_pb2
from tenfold.inference.v2 import inference_pb2
from tenfold.router.v1 import router_pb2 as pb
from tests.contract.standins import MESH
from tests.unit.router.fakes import FakeChannel, callee

FILE = meshfile.parse(MESH)
MODELS = models_of(FILE)
DELAY = MODELS["delay"]
VIEWS = {"route": ViewShape("route", "route", ("late", "flights"), 7)}
PLAN = make_plan(DELAY.tiers[0], "3", "CPUExecutionProvider", ["input.hour", "route.late", "route.flights"], VIEWS)
LIMITS = Limits(max_batch=8, max_in_flight=1, max_waiting=4)


class Stale:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def query(route: str = "a", model: str = "delay") -> Query:
    return Query(pb.PredictRequest(model=model, request_id=route), MODELS[model], {"route": route}, {}, {})


def wanted(route: str = "a", plan: TierPlan = PLAN) -> Call[Wanted]:
    return Call(Wanted(query(route), plan), Caller())


def view_rows(count: int = 1, **changes: object) -> bytes:
    parts: dict[str, object] = {
        "view": "route",
        "schema_hash": 7,
        "columns": 2,
        "values": np.arange(2 * count, dtype="<f4").tobytes(),
        "status": bytes([feature_pb2.STATUS_OK] * 2 * count),
        "age_s": np.full(count, 5, "<f4").tobytes(),
    }
    rows = feature_pb2.ViewRows(**parts | changes)  # type: ignore[arg-type]
    return feature_pb2.GetFeaturesResponse(views=[rows]).SerializeToString()


def features_with(channel: FakeChannel, answer: bytes | grpc.StatusCode, stale: Stale | None = None) -> Features:
    channel.answers[GET] = answer if isinstance(answer, grpc.StatusCode) else lambda _: answer
    return Features(callee(channel, name="feature"), LIMITS, stale or Stale())


async def test_stored_values_land_in_the_models_columns() -> None:
    gathered = await features_with(FakeChannel(), view_rows()).of(wanted())
    assert gathered.row[1:].tolist() == [0, 1]
    assert math.isnan(gathered.row[0])
    assert (gathered.ok, gathered.missing_share, gathered.max_age_s) == (2, 0.0, 5.0)


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff",
        feature_pb2.GetFeaturesResponse().SerializeToString(),
        view_rows(view="other"),
        view_rows(2),
        view_rows(columns=3),
        view_rows(values=b"abc"),
        view_rows(status=b""),
        view_rows(age_s=b""),
    ],
    ids=["no protobuf", "no view", "other view", "rows", "columns", "values", "status", "ages"],
)
async def test_an_answer_that_is_not_what_was_asked_for_is_no_features(answer: bytes) -> None:
    with pytest.raises(Unavailable, match="feature: its answer cannot be read") as error:
        await features_with(FakeChannel(), answer).of(wanted())
    assert error.value.reason is Reason.FEATURES_UNAVAILABLE


async def test_another_schema_is_never_guessed_at() -> None:
    stale = Stale()
    with pytest.raises(Unavailable, match="the schema of view 'route' changed"):
        await features_with(FakeChannel(), view_rows(schema_hash=8), stale).of(wanted())
    assert stale.times == 1


async def test_a_tier_that_reads_no_views_asks_for_none() -> None:
    channel = FakeChannel()
    plan = make_plan(DELAY.tiers[0], "3", "", ["input.hour"], VIEWS)
    gathered = await features_with(channel, grpc.StatusCode.UNAVAILABLE).of(wanted(plan=plan))
    assert (gathered.missing_share, channel.asked) == (0.0, [])


async def test_lookups_that_wait_together_travel_together() -> None:
    channel = FakeChannel()
    channel.held = asyncio.Event()

    def answer(raw: bytes) -> bytes:
        (keys,) = feature_pb2.GetFeaturesRequest.FromString(raw).views
        return view_rows(
            len(keys.entity_ids), values=np.array([[float(i)] * 2 for i in keys.entity_ids], "<f4").tobytes()
        )

    features = features_with(channel, b"")
    channel.answers[GET] = answer
    lookups = [asyncio.ensure_future(features.of(wanted("0")))]
    await asyncio.sleep(0.001)
    lookups += [asyncio.ensure_future(features.of(wanted(str(n)))) for n in (1, 2, 3)]
    await asyncio.sleep(0.001)
    channel.held.set()
    gathered = await asyncio.gather(*lookups)
    assert [row.row[1] for row in gathered] == [0, 1, 2, 3]
    assert len(channel.asked) == 2


def inferred(rows: int = 1, values: object = None, **changes: object) -> bytes:
    tensor = inference_pb2.ModelInferResponse.InferOutputTensor(
        name="late_probability", datatype="FP32", shape=[rows, 1]
    )
    numbers = np.asarray(np.arange(rows) if values is None else values, "<f4")
    parts: dict[str, object] = {"model_version": "3", "outputs": [tensor], "raw_output_contents": [numbers.tobytes()]}
    return inference_pb2.ModelInferResponse(**parts | changes).SerializeToString()  # type: ignore[arg-type]


def runner_with(channel: FakeChannel, answer: bytes | grpc.StatusCode, stale: Stale | None = None) -> TierRunner:
    channel.answers[INFER] = answer if isinstance(answer, grpc.StatusCode) else lambda _: answer
    return TierRunner(PLAN, "late_probability", callee(channel, name="inference/m"), LIMITS, stale or Stale())


def row(value: float = 0.0) -> Call[np.ndarray]:
    return Call(np.full(3, value, np.float32), Caller())


async def test_rows_travel_as_one_tensor_to_the_planned_version() -> None:
    channel = FakeChannel()
    channel.held = asyncio.Event()
    runner = runner_with(channel, b"")
    channel.answers[INFER] = lambda raw: inferred(inference_pb2.ModelInferRequest.FromString(raw).inputs[0].shape[0])
    answers = [asyncio.ensure_future(runner.answer(row(9)))]
    await asyncio.sleep(0.001)
    answers += [asyncio.ensure_future(runner.answer(row(n))) for n in (1, 2)]
    await asyncio.sleep(0.001)
    channel.held.set()
    assert [answer.values for answer in await asyncio.gather(*answers)] == [[0], [0], [1]]
    request = inference_pb2.ModelInferRequest.FromString(channel.asked[1][1])
    assert (request.model_name, request.model_version) == (PLAN.tier.model, "3")
    assert (request.inputs[0].name, request.inputs[0].datatype, list(request.inputs[0].shape)) == (
        "features",
        "FP32",
        [2, 3],
    )
    assert np.frombuffer(request.raw_input_contents[0], "<f4").tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff",
        inferred(outputs=[]),
        inferred(raw_output_contents=[]),
        inferred(raw_output_contents=[b"abc"]),
        inferred(
            outputs=[inference_pb2.ModelInferResponse.InferOutputTensor(name="late_probability", datatype="FP64")]
        ),
    ],
    ids=["no protobuf", "no output", "no bytes", "odd bytes", "other type"],
)
async def test_an_inference_answer_that_is_not_what_was_asked_for_is_a_failure(answer: bytes) -> None:
    with pytest.raises(Unavailable, match="inference/m: its answer cannot be read"):
        await runner_with(FakeChannel(), answer).answer(row())


async def test_an_answer_that_is_not_a_number_is_a_failure() -> None:
    with pytest.raises(Unavailable, match="its answer is not a number"):
        await runner_with(FakeChannel(), inferred(values=[math.nan])).answer(row())


async def test_the_answer_of_another_version_is_not_used_and_the_plan_is_looked_at() -> None:
    stale = Stale()
    with pytest.raises(Unavailable, match="version 4 answered, not 3"):
        await runner_with(FakeChannel(), inferred(model_version="4"), stale).answer(row())
    assert stale.times == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT])
async def test_a_version_that_is_gone_has_the_plan_looked_at(code: grpc.StatusCode) -> None:
    stale = Stale()
    with pytest.raises(CalleeError):
        await runner_with(FakeChannel(), code, stale).answer(row())
    assert stale.times == 1


async def test_no_room_there_or_in_our_own_queue_is_a_busy_tier() -> None:
    with pytest.raises(TierBusy):
        await runner_with(FakeChannel(), grpc.StatusCode.RESOURCE_EXHAUSTED).answer(row())
    channel = FakeChannel()
    channel.held = asyncio.Event()
    runner = runner_with(channel, inferred())
    waiting = [asyncio.ensure_future(runner.answer(row()))]
    await asyncio.sleep(0.001)
    waiting += [asyncio.ensure_future(runner.answer(row())) for _ in range(LIMITS.max_waiting)]
    await asyncio.sleep(0.001)
    with pytest.raises(TierBusy) as busy:
        await runner.answer(row())
    assert busy.value.reason is Reason.QUEUE_FULL
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def degraded(raw: bytes) -> bytes:
    request = pb.PredictRequest.FromString(raw)
    response = pb.PredictResponse(request_id=request.request_id)
    response.degradation.detail = "from the table"
    return response.SerializeToString()


def degraded_batch(raw: bytes) -> bytes:
    results = []
    for request in pb.PredictBatchRequest.FromString(raw).requests:
        if request.request_id == "b":
            results.append(pb.PredictResult(failure=pb.Failure(code=8, message="full", reason=2)))  # type: ignore[arg-type]
        else:
            response = pb.PredictResponse.FromString(degraded(request.SerializeToString()))
            results.append(pb.PredictResult(response=response))
    return pb.PredictBatchResponse(results=results).SerializeToString()


async def test_who_waits_for_fallback_for_one_reason_shares_a_call_and_fails_alone() -> None:
    channel = FakeChannel()
    channel.held = asyncio.Event()
    channel.answers = {PREDICT: degraded, PREDICT_BATCH: degraded_batch}
    standby = Standby(callee(channel, name="fallback"), LIMITS)

    def instead(name: str, cause: CallError) -> asyncio.Future[pb.PredictResponse]:
        return asyncio.ensure_future(standby.instead(query(name), Caller(), cause))

    first = instead("0", Unavailable("inference: down"))
    await asyncio.sleep(0.001)
    others = [instead(name, Unavailable("inference: down")) for name in "abc"]
    late = instead("late", DeadlineExceeded("too late"))
    await asyncio.sleep(0.001)
    channel.held.set()
    answers = await asyncio.gather(first, *others, late, return_exceptions=True)
    assert [a.request_id for a in answers if isinstance(a, pb.PredictResponse)] == ["0", "a", "c", "late"]
    assert isinstance(answers[0], pb.PredictResponse)
    assert answers[0].degradation.detail == "inference: down; from the table"
    assert str(answers[2]) == "inference: down; fallback: fallback: RESOURCE_EXHAUSTED: full"
    reasons = sorted((method, metadata["x-degraded-reason"]) for method, _, _, metadata in channel.asked)
    assert reasons == [(PREDICT, "deadline"), (PREDICT, "dependency_failed"), (PREDICT_BATCH, "dependency_failed")]


@pytest.mark.parametrize(
    ("cause", "status", "kind"),
    [
        (Unavailable("down"), grpc.StatusCode.UNAVAILABLE, Unavailable),
        (Refused(Reason.OVERLOADED, "busy"), grpc.StatusCode.RESOURCE_EXHAUSTED, Refused),
        (Refused(Reason.CIRCUIT_OPEN, "open"), grpc.StatusCode.RESOURCE_EXHAUSTED, Unavailable),
        (Refused(Reason.OVERLOADED, "busy"), grpc.StatusCode.UNAVAILABLE, Unavailable),
    ],
)
async def test_when_neither_answers_only_two_sheds_are_a_shed(
    cause: CallError, status: grpc.StatusCode, kind: type[CallError]
) -> None:
    channel = FakeChannel()
    channel.answers[PREDICT] = status
    standby = Standby(callee(channel, name="fallback"), LIMITS)
    with pytest.raises(kind, match=f"{cause}; fallback: ") as error:
        await standby.instead(query(), Caller(), cause)
    assert type(error.value) is kind


async def test_a_model_without_fallbacks_asks_none() -> None:
    channel = FakeChannel()
    standby = Standby(callee(channel), LIMITS)
    with pytest.raises(Unavailable, match=r"^down$"):
        await standby.instead(query(model="bare"), Caller(), Unavailable("down"))
    assert channel.asked == []
