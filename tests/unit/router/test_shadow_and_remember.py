from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import grpc
import pytest

from services.mesh import meshfile
from services.mesh.query import Query, models_of
from services.router.remember import MOST, REMEMBER, Remember
from services.router.shadow import AT_ONCE, Shadow
from services.router.standby import PREDICT
from tenfold.common.v1 import call_pb2
from tenfold.fallback.v1 import fallback_pb2
from tenfold.router.v1 import router_pb2 as pb
from tests.contract.standins import MESH
from tests.unit.router.fakes import FakeChannel, callee

FILE = meshfile.parse(MESH)
MODELS = models_of(FILE)


def answered(
    model: str, entities: Mapping[str, str], value: float, as_of_us: int = 0
) -> tuple[Query, pb.PredictResponse]:
    query = Query(pb.PredictRequest(as_of_us=as_of_us), MODELS[model], entities, {}, {})
    return query, pb.PredictResponse(outputs=[pb.Output(name="p", values=[value])])


def keep_all(raw: bytes) -> bytes:
    count = len(fallback_pb2.RememberRequest.FromString(raw).answers)
    return fallback_pb2.RememberResponse(kept=count).SerializeToString()


async def test_the_newest_answer_of_each_entity_travels_in_one_batch() -> None:
    channel = FakeChannel()
    channel.answers[REMEMBER] = keep_all
    remember = Remember(FILE, callee(channel), every_s=1.0)
    for route, value, as_of_us in (("a", 1, 100), ("a", 2, 300), ("a", 3, 200), ("b", 4, 100)):
        remember.note(*answered("delay", {"route": route}, value, as_of_us))
    await remember.send()
    ((_, raw, _, metadata),) = channel.asked
    sent = fallback_pb2.RememberRequest.FromString(raw).answers
    assert [(answer.entity_id, answer.outputs[0].values[0], answer.answered_us) for answer in sent] == [
        ("a", 2, 300),
        ("b", 4, 100),
    ]
    assert metadata["x-priority"] == "background"
    await remember.send()  # nothing new: no call
    assert len(channel.asked) == 1
    assert remember.sent == 2


async def test_a_model_that_repeats_no_answers_and_a_request_without_the_entity_are_not_kept() -> None:
    channel = FakeChannel()
    remember = Remember(FILE, callee(channel), every_s=1.0)
    remember.note(*answered("bare", {"route": "a"}, 1))
    remember.note(*answered("delay", {"tail": "a"}, 1))
    await remember.send()
    assert channel.asked == []


async def test_more_than_one_call_can_carry_is_dropped_and_counted() -> None:
    channel = FakeChannel()
    channel.answers[REMEMBER] = keep_all
    remember = Remember(FILE, callee(channel), every_s=1.0)
    for i in range(MOST + 3):
        remember.note(*answered("delay", {"route": str(i)}, i))
    remember.note(*answered("delay", {"route": "0"}, -1.0))  # known already: replaced, not dropped
    await remember.send()
    assert (remember.sent, remember.dropped) == (MOST, 3)


async def test_the_shadow_counts_and_sends_every_so_many() -> None:
    channel = FakeChannel()
    channel.answers[PREDICT] = lambda _: pb.PredictResponse(degradation=call_pb2.Degradation()).SerializeToString()
    shadow = Shadow(callee(channel), every=4)
    for n in range(13):
        shadow.see(pb.PredictRequest(request_id=str(n)))
    await asyncio.sleep(0.001)
    assert [pb.PredictRequest.FromString(raw).request_id for _, raw, _, _ in channel.asked] == ["3", "7", "11"]
    assert channel.asked[0][3]["x-priority"] == "background"
    assert (shadow.sent, shadow.answered) == (3, 3)


async def test_a_shadow_of_zero_sends_nothing() -> None:
    channel = FakeChannel()
    shadow = Shadow(callee(channel), every=0)
    for _ in range(1000):
        shadow.see(pb.PredictRequest())
    await asyncio.sleep(0.001)
    assert channel.asked == []


async def test_a_fallback_that_hangs_is_not_buried_under_shadows() -> None:
    channel = FakeChannel()
    channel.held = asyncio.Event()
    shadow = Shadow(callee(channel), every=1)
    for _ in range(AT_ONCE + 5):
        shadow.see(pb.PredictRequest())
    await asyncio.sleep(0.001)
    assert (len(channel.asked), shadow.skipped) == (AT_ONCE, 5)
    await shadow.close()


async def test_a_fallback_that_does_not_work_is_reported_once_until_it_changes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "services.router.shadow")
    channel = FakeChannel()
    shadow = Shadow(callee(channel), every=1)

    async def see(status: grpc.StatusCode | None) -> None:
        channel.answers[PREDICT] = status or (lambda _: b"")
        shadow.see(pb.PredictRequest())
        await asyncio.sleep(0.001)

    for status in (None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, None, None):
        await see(status)
    assert [record.message for record in caplog.records] == ["fallback does not work", "fallback works again"]
    assert shadow.failed == 2
