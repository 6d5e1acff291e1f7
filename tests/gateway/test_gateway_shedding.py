"""More in flight than a priority may have: refused by the gateway itself, and only that priority."""

import asyncio

import grpc
import pytest


def capped(mesh_text, cap):
    return mesh_text.replace("max_in_flight = 64", f"max_in_flight = {cap}")


async def test_the_call_above_the_cap_is_shed_and_told_when_to_come_back(world, mesh_text):
    router = await world.replica("router")
    await world.start(capped(mesh_text, 2))
    router.hold.clear()
    inside = [asyncio.ensure_future(world.predict("standard")) for _ in range(2)]
    await router.saw(2)
    with pytest.raises(grpc.aio.AioRpcError) as shed:
        await world.predict("standard")
    assert shed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "standard" in shed.value.details()
    told = dict(list(shed.value.trailing_metadata()))
    assert told["grpc-retry-pushback-ms"] == "100"
    assert told["x-shed-reason"] == "overloaded"
    router.hold.set()
    assert [answer.served_by.tier for answer in await asyncio.gather(*inside)] == ["router", "router"]


async def test_a_full_priority_takes_nothing_from_another(world, mesh_text):
    router = await world.replica("router")
    await world.start(capped(mesh_text, 1))
    router.hold.clear()
    background = asyncio.ensure_future(world.predict("background"))
    await router.saw(1)
    critical = asyncio.ensure_future(world.predict("critical"))
    await router.saw(2)
    assert await world.answers(3, priority="background") == {"RESOURCE_EXHAUSTED": 3}
    router.hold.set()
    assert (await critical).served_by.tier == (await background).served_by.tier == "router"


async def test_a_finished_call_makes_room(world, mesh_text):
    await world.replica("router")
    await world.start(capped(mesh_text, 1))
    assert await world.answers(20, concurrent=1) == {"router": 20}


async def test_a_cap_can_be_changed_while_running(world, mesh_text):
    await world.replica("router")
    await world.start(mesh_text)
    key = "circuit_breakers.router_standard.default.max_requests"
    await world.admin(f"/runtime_modify?{key}=0", "POST")
    assert await world.answers(3, priority="standard") == {"RESOURCE_EXHAUSTED": 3}
    assert await world.answers(3, priority="critical") == {"router": 3}
    await world.admin(f"/runtime_modify?{key}=", "POST")
    assert await world.answers(3, priority="standard") == {"router": 3}


async def test_many_cancelled_calls_do_not_cost_a_client_its_connection(world):
    """Envoy takes calls that end within a second for an attack unless told otherwise; its guard starts at 500."""
    router = await world.replica("router")
    await world.start()
    router.hold.clear()
    for _ in range(15):
        calls = [asyncio.ensure_future(world.predict("critical")) for _ in range(60)]
        await asyncio.sleep(0.02)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    router.hold.set()
    assert await world.answers(10, priority="critical") == {"router": 10}
    assert await world.stat("http.ingress.downstream_cx_total") == 1
