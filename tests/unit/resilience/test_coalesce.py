from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from services.resilience.call import Call, Caller
from services.resilience.coalesce import Coalescer, Limits
from services.resilience.errors import DeadlineExceeded, Reason, Refused


class Ticks:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Callee:
    """Doubles numbers, batch by batch, when it is let to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.cancelled: list[list[int]] = []
        self.go = asyncio.Event()
        self.fail_with: Exception | None = None

    def let_go(self) -> None:
        """Those in flight are answered; those that come later hang again."""
        self.go.set()
        self.go = asyncio.Event()

    async def __call__(self, calls: Sequence[Call[int]]) -> Sequence[int | Exception]:
        batch = [call.request for call in calls]
        self.batches.append(batch)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(batch)
            raise
        if self.fail_with is not None:
            raise self.fail_with
        return [ValueError(f"{n} is negative") if n < 0 else 2 * n for n in batch]


def call(number: int, deadline: float = float("inf")) -> Call[int]:
    return Call(number, Caller(deadline=deadline))


async def steps(count: int = 5) -> None:
    """Lets everything that can run now run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_lone_call_leaves_at_once_and_what_arrives_meanwhile_travels_together() -> None:
    callee = Callee()
    coalescer = Coalescer(callee, Limits(max_in_flight=1))
    first = coalescer.submit(call(1))
    await steps()
    rest = [coalescer.submit(call(n)) for n in (2, 3, 4)]
    await steps()
    assert callee.batches == [[1]]
    assert len(coalescer) == 3
    callee.go.set()
    assert await asyncio.gather(first, *rest) == [2, 4, 6, 8]
    assert callee.batches == [[1], [2, 3, 4]]
    assert (coalescer.batches, coalescer.members) == (2, 4)


async def test_a_batch_never_exceeds_its_limit_nor_do_batches_in_flight() -> None:
    callee = Callee()
    coalescer = Coalescer(callee, Limits(max_batch=3, max_in_flight=2))
    answers = [coalescer.submit(call(n)) for n in range(8)]
    await steps()
    assert callee.batches == [[0, 1, 2], [3, 4, 5]]
    callee.go.set()
    assert await asyncio.gather(*answers) == [2 * n for n in range(8)]
    assert callee.batches[2:] == [[6, 7]]


async def test_a_waiter_cancelled_while_its_batch_is_in_flight_harms_no_other_and_does_not_stall() -> None:
    callee = Callee()
    coalescer = Coalescer(callee, Limits(max_in_flight=1))
    blocker = coalescer.submit(call(0))
    await steps()
    tasks = [asyncio.create_task(coalescer.ask(call(n))) for n in (1, 2, 3)]
    await steps()
    callee.let_go()
    await blocker
    assert callee.batches[-1] == [1, 2, 3]
    tasks[1].cancel()
    await steps()
    callee.go.set()
    await asyncio.wait(tasks)
    assert (tasks[0].result(), tasks[1].cancelled(), tasks[2].result()) == (2, True, 6)
    assert callee.cancelled == []
    assert await coalescer.ask(call(9)) == 18


async def test_a_waiter_cancelled_in_the_queue_gives_its_place_back() -> None:
    callee = Callee()
    coalescer = Coalescer(callee, Limits(max_in_flight=1, max_waiting=2))
    blocker = coalescer.submit(call(0))
    await steps()
    waiting = [coalescer.submit(call(n)) for n in (1, 2)]
    waiting[0].cancel()
    late = coalescer.submit(call(3))  # the place of the cancelled one
    with pytest.raises(Refused):
        coalescer.submit(call(4))
    callee.go.set()
    assert await asyncio.gather(blocker, waiting[1], late) == [0, 4, 6]
    assert callee.batches == [[0], [2, 3]]


async def test_a_batch_in_flight_that_nobody_waits_for_is_cancelled_and_the_next_is_served() -> None:
    callee = Callee()
    coalescer = Coalescer(callee, Limits(max_batch=2, max_in_flight=1))
    gone = [asyncio.create_task(coalescer.ask(call(n))) for n in (1, 2)]
    await steps()
    behind = asyncio.create_task(coalescer.ask(call(3)))
    await steps()
    gone[0].cancel()
    await steps()
    assert callee.cancelled == []  # one still waits
    gone[1].cancel()
    await steps()
    assert callee.cancelled == [[1, 2]]
    assert callee.batches == [[1, 2], [3]]
    callee.go.set()
    assert await behind == 6
    await coalescer.drain()


async def test_a_batch_finished_in_the_step_in_which_its_last_waiter_left_stalls_nothing() -> None:
    callee = Callee()
    coalescer = Coalescer(callee, Limits(max_in_flight=1))
    task = asyncio.create_task(coalescer.ask(call(1)))
    await steps()
    callee.go.set()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await asyncio.wait_for(coalescer.ask(call(2)), 5) == 4
    await asyncio.wait_for(coalescer.drain(), 5)


async def test_a_call_submitted_in_the_very_step_in_which_the_worker_ends_is_not_lost() -> None:
    later: list[asyncio.Future[int]] = []

    async def run(calls: Sequence[Call[int]]) -> Sequence[int]:
        return [2 * c.request for c in calls]

    coalescer: Coalescer[int, int] = Coalescer(run, Limits(max_in_flight=1))
    loop = asyncio.get_running_loop()

    # callbacks of the answer run in the steps around the worker's end: submit in each of them
    def again(_: object, depth: int = 0) -> None:
        later.append(coalescer.submit(call(10 + depth)))
        if depth < 5:
            loop.call_soon(again, None, depth + 1)

    coalescer.submit(call(1)).add_done_callback(again)
    await steps(20)
    assert [future.result() for future in later] == [20, 22, 24, 26, 28, 30]


async def test_a_full_queue_refuses_at_once_and_says_why() -> None:
    callee = Callee()
    coalescer = Coalescer(callee, Limits(max_in_flight=1, max_waiting=2))
    kept = [coalescer.submit(call(0))]
    await steps()
    kept += [coalescer.submit(call(n)) for n in (1, 2)]
    with pytest.raises(Refused) as refusal:
        coalescer.submit(call(3))
    assert refusal.value.reason is Reason.QUEUE_FULL
    callee.go.set()
    assert await asyncio.gather(*kept) == [0, 2, 4]


async def test_members_whose_deadline_passed_in_the_queue_never_travel() -> None:
    clock, callee = Ticks(), Callee()
    coalescer = Coalescer(callee, Limits(max_in_flight=1), clock)
    blocker = coalescer.submit(call(0))
    await steps()
    late, timely = coalescer.submit(call(1, deadline=5.0)), coalescer.submit(call(2, deadline=50.0))
    clock.now = 10.0
    callee.go.set()
    assert await asyncio.gather(blocker, timely) == [0, 4]
    with pytest.raises(DeadlineExceeded, match="while the call waited for its batch"):
        await late
    assert callee.batches == [[0], [2]]


async def test_whoever_asks_hears_of_a_passed_deadline_while_the_batch_still_hangs() -> None:
    clock, callee = Ticks(), Callee()
    coalescer = Coalescer(callee, Limits(max_in_flight=1), clock)
    patient = asyncio.create_task(coalescer.ask(call(1)))
    hurried = asyncio.create_task(coalescer.ask(call(2, deadline=0.001)))
    with pytest.raises(DeadlineExceeded, match="before the answer came"):
        await hurried
    assert not patient.done()
    callee.go.set()
    assert await patient == 2


async def test_an_error_in_a_place_fails_that_member_alone() -> None:
    callee = Callee()
    callee.go.set()
    coalescer = Coalescer(callee, Limits())
    answers = await asyncio.gather(*(coalescer.submit(call(n)) for n in (1, -2, 3)), return_exceptions=True)
    assert answers[0::2] == [2, 6]
    assert str(answers[1]) == "-2 is negative"


async def test_a_batch_that_fails_as_a_whole_fails_each_member_and_the_next_batch_is_served() -> None:
    callee = Callee()
    callee.fail_with = ConnectionError("gone")
    callee.go.set()
    coalescer = Coalescer(callee, Limits())
    answers = await asyncio.gather(*(coalescer.submit(call(n)) for n in (1, 2)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["gone", "gone"]
    callee.fail_with = None
    assert await coalescer.submit(call(3)) == 6


async def test_a_batch_with_too_few_answers_fails_rather_than_mixing_them_up() -> None:
    async def forgetful(calls: Sequence[Call[int]]) -> Sequence[int]:
        return [1]

    coalescer: Coalescer[int, int] = Coalescer(forgetful, Limits())
    answers = await asyncio.gather(*(coalescer.submit(call(n)) for n in (1, 2)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["a batch of 2 got 1 answers"] * 2


async def test_drain_returns_when_the_last_batch_is_answered() -> None:
    callee = Callee()
    coalescer = Coalescer(callee, Limits(max_batch=1, max_in_flight=1))
    answers = [coalescer.submit(call(n)) for n in range(3)]
    drained = asyncio.create_task(coalescer.drain())
    await steps()
    assert not drained.done()
    callee.go.set()
    await drained
    assert [answer.result() for answer in answers] == [0, 2, 4]
    await coalescer.drain()  # with nothing under way it returns at once


@pytest.mark.parametrize("name", ["max_batch", "max_in_flight", "max_waiting"])
def test_limits_below_one_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Limits(**{name: 0})
