"""A deadline is the client's own, reaches the callee, and ends the call."""

import asyncio

import grpc
import pytest

from tenfold.feature.v1 import feature_pb2, feature_pb2_grpc
from tenfold.inference.v2 import inference_pb2, inference_pb2_grpc


async def test_the_clients_deadline_reaches_the_upstream(world):
    router = await world.replica("router")
    await world.start()
    await world.predict(timeout=40)
    assert 20 < router.remaining_s[0] < 41


async def test_a_call_without_a_deadline_gets_the_meshs(world):
    router = await world.replica("router")
    await world.start()
    await world.predict(timeout=None)
    assert router.seen
    assert 0 < router.remaining_s[0] <= 1.5


async def test_a_late_answer_is_deadline_exceeded_also_for_who_set_no_deadline(world, mesh_text):
    router = await world.replica("router")
    await world.start(mesh_text.replace("default_timeout_ms = 1500", "default_timeout_ms = 200"))
    router.hold.clear()
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await world.predict(timeout=None)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await router.cancelled.wait()


async def test_the_gateway_itself_ends_a_call_at_the_clients_deadline(world):
    """Sent as plain metadata, so that no client library watches the clock."""
    router = await world.replica("router")
    await world.start()
    router.hold.clear()
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await world.ingress.unary_unary("/tenfold.router.v1.RouterService/Predict")(
            b"", metadata=[("grpc-timeout", "150m")]
        )
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_late_call_is_not_tried_again(world):
    router, fallback = await world.replica("router"), await world.replica("fallback")
    await world.start()
    router.hold.clear()
    assert await world.answers(1, timeout=0.2) == {"DEADLINE_EXCEEDED": 1}
    await router.cancelled.wait()
    assert not fallback.seen


async def test_a_deadline_travels_between_services_and_none_is_added(world):
    feature = await world.replica("feature")
    await world.start()
    get = feature_pb2_grpc.FeatureServiceStub(world.egress).GetFeatures
    await get(feature_pb2.GetFeaturesRequest(), timeout=30)
    await get(feature_pb2.GetFeaturesRequest())
    first, second = feature.remaining_s
    assert 15 < first < 31  # grpcio rounds up what it sends
    assert second is None or second > 1e6


async def test_a_stream_may_last_longer_than_a_call(world, mesh_text):
    inference = await world.replica("inference")
    await world.start(mesh_text.replace("default_timeout_ms = 1500", "default_timeout_ms = 100"))
    call = inference_pb2_grpc.GRPCInferenceServiceStub(world.ingress).ModelStreamInfer()
    for number in ("1", "2"):
        await call.write(inference_pb2.ModelInferRequest(id=number))
        assert (await call.read()).infer_response.id == number
        await asyncio.sleep(0.15)  # past what a call without a deadline would get
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
    assert "grpc-timeout" not in inference.seen[0]


async def test_a_call_that_its_client_cancels_is_cancelled_upstream(world):
    router = await world.replica("router")
    await world.start()
    router.hold.clear()
    call = world.predict()
    waiting = asyncio.ensure_future(call)
    await router.arrived.wait()
    call.cancel()
    await router.cancelled.wait()
    with pytest.raises(asyncio.CancelledError):
        await waiting
