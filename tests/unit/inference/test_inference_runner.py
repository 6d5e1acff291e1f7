"""One model's execution: batches, faults, cancellation, the thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping

import numpy as np
import pytest

from services.inference.backend import DeviceFault, InputFault, LoadError, warm_up
from services.inference.batcher import Estimate, Limits
from services.inference.runner import Runner, Share
from services.inference.tensors import DATATYPES, Array, Inputs, Signature, TensorSpec
from services.resilience.call import Caller
from services.resilience.errors import BadInput, DeadlineExceeded, Refused, Unavailable

FP32 = DATATYPES["FP32"]


class Doubling:
    """A backend that doubles, counts its runs and notes their threads. Cannot stand negative numbers."""

    provider = "FakeExecutionProvider"
    metadata: Mapping[str, str] = {}

    def __init__(self, compute: Callable[[Array], Array] = lambda x: x * 2, shape: tuple[int, ...] = (-1, 1)) -> None:
        self.inputs = [TensorSpec("x", FP32, shape)]
        self.outputs = [TensorSpec("y", FP32, shape)]
        self.sizes: list[int] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self._compute = compute

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        x = feeds["x"]
        self.sizes.append(len(x))
        self.threads.add(threading.current_thread().name)
        self.entered.release()
        assert self.gate.wait(30)
        if (x < 0).any():
            raise InputFault("negative")
        if (x > 1e6).any():
            raise DeviceFault("out of memory")
        return [self._compute(x)]


class Bench:
    """A runner over a Doubling. A long estimate puts runs on the thread, where the gate can hold them."""

    def __init__(self, *, seconds: float = 0.0, limits: Limits | None = None) -> None:
        self.backend = Doubling()
        limits = limits or Limits(max_run_s=60)
        self.signature = Signature(self.backend.inputs, self.backend.outputs, limits.max_rows)
        self.estimate = Estimate()
        self.estimate.fixed_s = seconds
        self.now = 0.0
        self.runner = Runner(self.backend, self.signature, limits, self.estimate, clock=lambda: self.now)

    def ask(self, *values: float, deadline: float = float("inf")) -> asyncio.Task[Share]:
        data = np.array(values, np.float32)
        inputs = Inputs(len(values), ((1,),), [data.tobytes()])
        return asyncio.create_task(self.runner.infer(inputs, Caller(deadline=deadline)))

    async def running(self) -> None:
        """Returns when a run has entered the backend."""
        while not self.backend.entered.acquire(blocking=False):  # noqa: ASYNC110 - it is a thread that enters
            await asyncio.sleep(0.001)

    async def waiting(self, count: int) -> None:
        while len(self.runner) != count:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0)


@pytest.fixture
async def held() -> AsyncIterator[Bench]:
    """A bench whose first run is under way on the thread, and stays there until the gate opens."""
    bench = Bench(seconds=0.010)
    bench.backend.gate.clear()
    first = bench.ask(1)
    await bench.running()
    yield bench
    bench.backend.gate.set()
    await first
    await bench.runner.drain()
    bench.runner.close()


def values(share: Share) -> list[float]:
    return np.frombuffer(share.outputs.raw(0, share.start, share.rows), np.float32).tolist()


async def test_calls_that_arrive_together_run_together_and_get_their_own_rows() -> None:
    bench = Bench()
    shares = await asyncio.gather(bench.ask(1), bench.ask(2, 3), bench.ask(4))
    assert [values(share) for share in shares] == [[2], [4, 6], [8]]
    assert bench.backend.sizes == [4]
    assert {share.batch_rows for share in shares} == {4}


async def test_a_short_run_stays_on_the_loop_and_a_long_one_leaves_it() -> None:
    here = threading.current_thread().name
    short, long = Bench(seconds=0.0001), Bench(seconds=0.010)
    await short.ask(1)
    await long.ask(1)
    assert short.backend.threads == {here}
    assert here not in long.backend.threads
    long.runner.close()


async def test_what_arrives_during_a_run_shares_the_next_one(held: Bench) -> None:
    asked = [held.ask(value) for value in (2, 3, 4)]
    await held.waiting(3)
    held.backend.gate.set()
    assert [values(share) for share in await asyncio.gather(*asked)] == [[4], [6], [8]]
    assert held.backend.sizes == [1, 3]


async def test_a_cancelled_call_leaves_the_queue_and_never_runs(held: Bench) -> None:
    gone, stays = held.ask(2), held.ask(3)
    await held.waiting(2)
    gone.cancel()
    await held.waiting(1)
    held.backend.gate.set()
    assert values(await stays) == [6]
    assert held.backend.sizes == [1, 1]


async def test_a_call_cancelled_while_it_runs_does_not_take_its_neighbours_along(held: Bench) -> None:
    gone, stays = held.ask(2), held.ask(3)
    await held.waiting(2)
    held.backend.gate.set()
    await held.running()
    gone.cancel()
    assert values(await stays) == [6]


async def test_only_the_bad_member_of_a_batch_fails() -> None:
    bench = Bench()
    good, bad, other = await asyncio.gather(bench.ask(1), bench.ask(-1), bench.ask(3), return_exceptions=True)
    assert isinstance(good, Share)
    assert isinstance(other, Share)
    assert (values(good), values(other)) == ([2], [6])
    assert isinstance(bad, BadInput)
    assert "the model cannot run on them: negative" in str(bad)
    assert bench.backend.sizes == [3, 1, 1, 1]


async def test_a_fault_of_the_device_is_nobodys_input_and_spares_who_can_run_alone() -> None:
    bench = Bench()
    fine, too_much = await asyncio.gather(bench.ask(1), bench.ask(1e7), return_exceptions=True)
    assert isinstance(fine, Share)
    assert values(fine) == [2]
    assert isinstance(too_much, Unavailable)
    assert bench.backend.sizes == [2, 1, 1]


async def test_a_call_that_fails_alone_is_not_tried_again() -> None:
    bench = Bench()
    with pytest.raises(BadInput):
        await bench.ask(-1)
    assert bench.backend.sizes == [1]
    assert values(await bench.ask(5)) == [10]


async def test_a_deadline_that_cannot_hold_ends_the_call_before_any_work(held: Bench) -> None:
    with pytest.raises(DeadlineExceeded):
        await held.ask(2, deadline=0.005)
    in_time = held.ask(3, deadline=0.050)
    await held.waiting(1)
    held.now = 0.045  # the run under way took longer than anyone thought
    held.backend.gate.set()
    with pytest.raises(DeadlineExceeded, match="would have passed"):
        await in_time
    assert held.backend.sizes == [1]


async def test_a_full_queue_refuses() -> None:
    bench = Bench(seconds=0.010, limits=Limits(max_waiting=1, max_run_s=60))
    bench.backend.gate.clear()
    first = bench.ask(1)
    await bench.running()
    second = bench.ask(2)
    await bench.waiting(1)
    with pytest.raises(Refused, match="1 calls wait already"):
        await bench.ask(3)
    bench.backend.gate.set()
    assert [values(share) for share in await asyncio.gather(first, second)] == [[2], [4]]
    bench.runner.close()


async def test_statistics_count_rows_runs_and_failures() -> None:
    bench = Bench()
    await asyncio.gather(bench.ask(1), bench.ask(2, 3), bench.ask(-1), return_exceptions=True)
    await bench.ask(4)
    kept = bench.runner.statistics
    assert (kept.rows, kept.runs, kept.success.count, kept.fail.count) == (4, 5, 3, 1)
    assert sorted(kept.by_rows) == [1, 4]


async def test_drain_waits_for_what_runs_and_what_waits(held: Bench) -> None:
    asked = held.ask(2)
    await held.waiting(1)
    drained = asyncio.create_task(held.runner.drain())
    await asyncio.sleep(0)
    assert not drained.done()
    held.backend.gate.set()
    await drained
    assert asked.done() or values(await asked) == [4]
    assert held.backend.sizes == [1, 1]


def test_warm_up_runs_one_row_and_a_large_batch() -> None:
    backend = Doubling()
    ticks = iter(range(10_000))
    warmed = warm_up(backend, Limits(max_rows=16, max_run_s=100), clock=lambda: float(next(ticks)))
    assert warmed.signature.max_batch == 16
    assert {1, 16} <= set(backend.sizes)
    assert warmed.estimate.of(1) == pytest.approx(1.0)  # each run took one tick


def test_a_model_whose_rows_mix_is_served_without_batching() -> None:
    warmed = warm_up(Doubling(lambda x: x / (1 + np.abs(x).sum())), Limits())
    assert warmed.signature.max_batch == 0
    assert warmed.note == "not batched: output y of a row depends on the rows beside it"


def test_a_model_that_answers_once_for_all_rows_is_served_without_batching() -> None:
    warmed = warm_up(Doubling(lambda x: x[:1]), Limits())
    assert warmed.signature.max_batch == 0
    assert warmed.note == "not batched: output y has shape (1, 1) for 2 rows"


def test_a_model_with_a_fixed_first_dimension_is_served_without_batching() -> None:
    assert warm_up(Doubling(shape=(3, 1)), Limits()).signature.max_batch == 0


def test_a_model_that_does_not_run_is_refused() -> None:
    def broken(x: Array) -> Array:
        raise InputFault("Gather index 0 is out of range")

    with pytest.raises(LoadError, match="it does not run on zeros: Gather index 0 is out of range"):
        warm_up(Doubling(broken), Limits())
