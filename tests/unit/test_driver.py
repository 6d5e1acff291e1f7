import asyncio

from loadtest.driver import closed_loop, constant, open_loop, percentile


async def test_a_server_that_stalls_cannot_hide_it_from_an_open_loop() -> None:
    stalled = asyncio.Event()

    async def send(i: int) -> str:
        await stalled.wait()
        return "ok"

    run = asyncio.create_task(open_loop(send, constant(rate=100, count=5)))
    await asyncio.sleep(0.1)  # all five have left although none was answered
    stalled.set()
    record = await run
    assert record.endings == {"ok": 5}
    # counted from the intended times: the first was due 40 ms before the last, and both were answered together
    assert record.latencies_s[0] > record.latencies_s[-1]


async def test_calls_beyond_the_pending_limit_are_counted_as_unsent() -> None:
    release = asyncio.Event()

    async def send(i: int) -> str:
        await release.wait()
        return "ok"

    run = asyncio.create_task(open_loop(send, constant(rate=10_000, count=6), max_pending=2))
    await asyncio.sleep(0.05)
    release.set()
    assert (await run).endings == {"ok": 2, "unsent": 4}


async def test_a_closed_loop_never_has_more_calls_open_than_callers() -> None:
    open_now, most = 0, 0

    async def send(i: int) -> str:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.001)
        open_now -= 1
        return "ok"

    record = await closed_loop(send, callers=3, seconds=0.05)
    assert most == 3
    assert record.sent == len(record.latencies_s) >= 3


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(v) for v in range(100)]
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 0.99) == 99.0
    assert percentile([], 0.5) != percentile([], 0.5)
