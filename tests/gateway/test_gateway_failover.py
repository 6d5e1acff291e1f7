"""A router that dies, refuses or says that it cannot serve: who answers then, and how often anything is tried."""

import asyncio
import contextlib

import grpc
import pytest

from services.resilience.errors import DeadlineExceeded, NotFound, Reason, Refused
from tenfold.feature.v1 import feature_pb2, feature_pb2_grpc

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_killing_the_last_router_loses_no_call_and_its_return_is_noticed(world):
    await world.replica("fallback")
    process = await world.process("router")
    await world.start()
    before = await world.answers(50)
    under_way = asyncio.ensure_future(world.answers(600, concurrent=32))
    await asyncio.sleep(0.1)
    process.kill()
    during = await under_way
    assert before == {"router": 50}
    assert set(during) == {"router", "fallback"}
    await world.until_health("router_standard", "router", healthy=False)
    assert await world.answers(50) == {"fallback": 50}
    await world.process("router")
    await world.until_health("router_standard", "router", healthy=True)
    assert await world.answers(50) == {"router": 50}


async def test_one_dead_router_of_two_loses_no_call_and_the_other_makes_up_for_it(world):
    await world.replica("fallback")
    process = await world.process("r1")
    await world.process("r2")
    await world.start(router=["r1", "r2"])
    under_way = asyncio.ensure_future(world.answers(600, concurrent=32))
    await asyncio.sleep(0.1)
    process.kill()
    answered = await under_way
    # 16 were in flight at the one that died; a call is left to fallback only where its second try failed as well
    assert answered.get("fallback", 0) <= 5
    await world.until_health("router_standard", "r1", healthy=False)
    assert await world.answers(50) == {"r2": 50}


async def test_where_every_router_is_unavailable_fallback_still_answers(world):
    fallback = await world.replica("fallback")
    for name in ("r1", "r2"):
        (await world.replica("router", name)).code = UNAVAILABLE
    await world.start(router=["r1", "r2"])
    assert await world.answers(5, concurrent=1) == {"fallback": 5}
    assert len(fallback.seen) == 5


async def test_no_router_and_no_fallback_is_unavailable(world):
    await world.start()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await world.predict()
    assert ended.value.code() is UNAVAILABLE
    # a reason would say that somebody is alive and refused
    assert "x-shed-reason" not in dict(list(ended.value.trailing_metadata()))


async def test_a_router_that_is_unavailable_is_helped_by_fallback_at_once(world):
    router, fallback = await world.replica("router"), await world.replica("fallback")
    router.code = UNAVAILABLE
    await world.start()
    assert await world.answers(3, concurrent=1) == {"fallback": 3}
    assert (len(router.seen), len(fallback.seen)) == (3, 3)


async def test_a_failed_call_is_tried_once_more_and_no_oftener(world):
    router, fallback = await world.replica("router"), await world.replica("fallback")
    router.code = fallback.code = UNAVAILABLE
    await world.start()
    assert await world.answers(1) == {"UNAVAILABLE": 1}
    assert (len(router.seen), len(fallback.seen)) == (1, 1)


async def test_one_attempt_means_one(world, mesh_text):
    router, fallback = await world.replica("router"), await world.replica("fallback")
    router.code = UNAVAILABLE
    await world.start(mesh_text.replace("[gateway]", "[gateway]\nretries = { attempts = 1 }"))
    assert await world.answers(1) == {"UNAVAILABLE": 1}
    assert (len(router.seen), len(fallback.seen)) == (1, 0)


async def test_a_shed_is_not_tried_again(world):
    router, fallback = await world.replica("router"), await world.replica("fallback")
    router.code = EXHAUSTED
    await world.start()
    assert await world.answers(20) == {"RESOURCE_EXHAUSTED": 20}
    assert (len(router.seen), len(fallback.seen)) == (20, 0)


async def test_between_services_the_next_try_goes_to_another_replica(world):
    sick, well = await world.replica("feature", "f1"), await world.replica("feature", "f2")
    sick.code, sick.fail_next = UNAVAILABLE, 4
    await world.start(feature=["f1", "f2"])
    get = feature_pb2_grpc.FeatureServiceStub(world.egress).GetFeatures
    for _ in range(20):
        await get(feature_pb2.GetFeaturesRequest(), timeout=5)
    assert sick.seen
    assert well.seen


async def test_retries_between_services_keep_to_their_budget(world):
    feature = await world.replica("feature")
    await world.start()
    feature.code = UNAVAILABLE
    feature.hold.clear()
    get = feature_pb2_grpc.FeatureServiceStub(world.egress).GetFeatures
    calls = [asyncio.ensure_future(get(feature_pb2.GetFeaturesRequest(), timeout=5).code()) for _ in range(100)]
    await feature.saw(100)
    feature.hold.set()
    assert set(await asyncio.gather(*calls)) == {UNAVAILABLE}
    assert await world.stat("cluster.feature.upstream_rq_retry_overflow") > 50
    assert len(feature.seen) < 150


async def test_a_replica_that_says_not_serving_gets_no_calls(world):
    one, two = await world.replica("router", "r1"), await world.replica("router", "r2")
    await world.start(router=["r1", "r2"])
    await world.says_ready("r1", False)
    await world.until_health("router_standard", "r1", healthy=False)
    one.seen.clear()
    assert await world.answers(20) == {"r2": 20}
    await world.says_ready("r1", True)
    await world.until_health("router_standard", "r1", healthy=True)
    await world.answers(40)
    assert one.seen
    assert two.seen


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_of_several_replicas_one_that_keeps_failing_is_left_alone_for_a_while(world, transport):
    sick = await world.replica("feature", "f1", transport)
    await world.replica("feature", "f2", transport)
    sick.code = UNAVAILABLE
    await world.start(feature=["f1", "f2"])
    get = feature_pb2_grpc.FeatureServiceStub(world.egress).GetFeatures
    for _ in range(300):
        assert (await get(feature_pb2.GetFeaturesRequest(), timeout=5)).views[0].view == "f2"
    assert await world.stat("cluster.feature.outlier_detection.ejections_enforced_total") == 1
    assert len(sick.seen) == 50


@pytest.mark.parametrize("transport", ["grpcio", "native"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DeadlineExceeded("no time left"), "DEADLINE_EXCEEDED"),
        (Refused(Reason.QUEUE_FULL), "RESOURCE_EXHAUSTED"),
        (NotFound("no such model"), "NOT_FOUND"),
    ],
)
async def test_refusals_and_short_deadlines_do_not_make_a_replica_sick(world, transport, error, told):
    router, fallback = await world.replica("router", transport=transport), await world.replica("fallback")
    router.error = error
    await world.start()
    assert await world.answers(60, concurrent=1) == {told: 60}
    assert not fallback.seen


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_clients_in_a_hurry_do_not_make_a_replica_sick(world, transport):
    router, fallback = await world.replica("router", transport=transport), await world.replica("fallback")
    await world.start()
    router.hold.clear()
    assert await world.answers(40, concurrent=4, timeout=0.02) == {"DEADLINE_EXCEEDED": 40}
    router.hold.set()
    assert await world.answers(10) == {"router": 10}
    assert not fallback.seen


async def test_calls_to_methods_that_are_not_there_do_not_make_a_replica_sick(world):
    await world.replica("router")
    await world.start()
    lost = world.ingress.unary_unary("/tenfold.router.v1.RouterService/Lost")
    for _ in range(60):
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await lost(b"", timeout=5)
        assert ended.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert await world.answers(10, priority="background") == {"router": 10}


async def test_a_dead_service_is_unavailable_between_services_and_comes_back(world):
    await world.start()
    get = feature_pb2_grpc.FeatureServiceStub(world.egress).GetFeatures
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await get(feature_pb2.GetFeaturesRequest(), timeout=5)
    assert ended.value.code() is UNAVAILABLE
    await world.replica("feature")
    await world.until_health("feature", "feature", healthy=True)
    with contextlib.suppress(grpc.aio.AioRpcError):
        await get(feature_pb2.GetFeaturesRequest(), timeout=5)
    assert (await get(feature_pb2.GetFeaturesRequest(), timeout=5)).views
