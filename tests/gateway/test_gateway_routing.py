"""Which call goes where, and what the callee sees of it."""

import os

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tenfold.fallback.v1 import fallback_pb2, fallback_pb2_grpc
from tenfold.feature.v1 import feature_pb2, feature_pb2_grpc
from tenfold.inference.v2 import inference_pb2, inference_pb2_grpc
from tenfold.router.v1 import router_pb2, router_pb2_grpc


async def test_clients_reach_router_and_inference_by_service(world):
    await world.replica("router")
    await world.replica("inference")
    await world.start()
    infer = inference_pb2_grpc.GRPCInferenceServiceStub(world.ingress).ModelInfer
    assert (await world.predict()).served_by.tier == "router"
    assert (await infer(inference_pb2.ModelInferRequest(), timeout=5)).model_name == "inference"


async def test_services_reach_each_other_by_service(world):
    for service in ("feature", "inference", "fallback"):
        await world.replica(service)
    await world.start()
    get = feature_pb2_grpc.FeatureServiceStub(world.egress).GetFeatures
    infer = inference_pb2_grpc.GRPCInferenceServiceStub(world.egress).ModelInfer
    predict = router_pb2_grpc.RouterServiceStub(world.egress).Predict
    remember = fallback_pb2_grpc.FallbackServiceStub(world.egress).Remember
    assert (await get(feature_pb2.GetFeaturesRequest(), timeout=5)).views[0].view == "feature"
    assert (await infer(inference_pb2.ModelInferRequest(), timeout=5)).model_name == "inference"
    assert (await predict(router_pb2.PredictRequest(), timeout=5)).served_by.tier == "fallback"
    assert (await remember(fallback_pb2.RememberRequest(), timeout=5)).kept == 7


async def test_features_are_not_for_clients(world):
    await world.replica("feature")
    await world.start()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await feature_pb2_grpc.FeatureServiceStub(world.ingress).GetFeatures(feature_pb2.GetFeaturesRequest())
    assert ended.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "/tenfold.feature.v1.FeatureService/GetFeatures" in ended.value.details()


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("critical", "critical"),
        ("standard", "standard"),
        ("background", "background"),
        (None, "background"),
        ("", "background"),
        ("CRITICAL", "background"),
        ("critical,critical", "background"),
        ("urgent", "background"),
    ],
)
async def test_upstream_sees_one_of_three_priorities(world, sent, seen):
    router = await world.replica("router")
    await world.start()
    await world.predict(sent)
    assert router.seen[0]["x-priority"] == seen


async def test_inference_sees_a_valid_priority_too(world):
    inference = await world.replica("inference")
    await world.start()
    infer = inference_pb2_grpc.GRPCInferenceServiceStub(world.ingress).ModelInfer
    await infer(inference_pb2.ModelInferRequest(), timeout=5, metadata=[("x-priority", "junk")])
    assert inference.seen[0]["x-priority"] == "background"


async def test_what_clients_may_not_set_is_stripped(world):
    router = await world.replica("router")
    await world.start()
    forbidden = {
        "x_degraded_reason": "overloaded",
        "x_envoy_retry_on": "5xx",
        "x_envoy_max_retries": "100",
        "x_envoy_upstream_rq_timeout_ms": "1",
        "x_envoy_force_trace": "true",
        "x_envoy_decorator_operation": "mine",
        "x_envoy_original_path": "/elsewhere",
    }
    # an address that some proxies take for one of their own
    await world.predict(**forbidden, x_forwarded_for="10.0.0.1", x_cohort="b", x_tenant="acme")
    (seen,) = router.seen
    assert not {key.replace("_", "-") for key in forbidden} & set(seen)
    assert (seen["x-cohort"], seen["x-tenant"]) == ("b", "acme")


async def test_a_client_cannot_ask_for_more_retries(world):
    router, fallback = await world.replica("router"), await world.replica("fallback")
    router.code = fallback.code = grpc.StatusCode.RESOURCE_EXHAUSTED
    await world.start()
    told = await world.answers(
        1, x_envoy_retry_grpc_on="resource-exhausted", x_envoy_retry_on="5xx", x_envoy_max_retries="5"
    )
    assert told == {"RESOURCE_EXHAUSTED": 1}
    assert len(router.seen) + len(fallback.seen) == 1


async def test_a_caller_without_a_tenant_is_the_public(world):
    router = await world.replica("router")
    await world.start()
    await world.predict()
    assert router.seen[0]["x-tenant"] == "public"


async def test_nothing_is_added_between_services(world):
    feature = await world.replica("feature")
    await world.start()
    get = feature_pb2_grpc.FeatureServiceStub(world.egress).GetFeatures
    await get(feature_pb2.GetFeaturesRequest(), timeout=5, metadata=[("x-degraded-reason", "overloaded")])
    assert set(feature.seen[0]) <= {"user-agent", "x-forwarded-proto", "x-degraded-reason"}
    assert feature.seen[0]["x-degraded-reason"] == "overloaded"


async def test_clients_can_ask_whether_anyone_is_there(world):
    await world.replica("router")
    await world.start()
    check = health_pb2_grpc.HealthStub(world.ingress).Check
    asked = health_pb2.HealthCheckRequest(service="tenfold.router.v1.RouterService")
    assert (await check(asked, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_large_message_passes_both_ways(world):
    await world.replica("inference")
    await world.start()
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    tensor = bytes(12 * 2**20)
    async with grpc.aio.insecure_channel(world.address("ingress"), options=options) as channel:
        infer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        answer = await infer(inference_pb2.ModelInferRequest(raw_input_contents=[tensor]), timeout=30)
    assert answer.raw_output_contents[0] == tensor


async def test_admin_listens_on_loopback_alone(world):
    await world.start()
    listening = await world.admin("/listeners?format=json")
    assert str(world.folder) in listening
    owned = _tcp_listeners(world.envoy.pid)
    assert owned
    assert {host for host, _ in owned} == {"0100007F"}


def _tcp_listeners(pid):
    """(address as /proc/net/tcp writes it, port) of what a process listens on."""
    inodes = set()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
        if target.startswith("socket:"):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as lines:
            for line in list(lines)[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.add(tuple(fields[1].split(":")))
    return found
