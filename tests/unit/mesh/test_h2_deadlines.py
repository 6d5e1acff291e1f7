from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.mesh.h2deadlines import Deadlines
from services.mesh.h2exchange import Exchange


class TurnedLoop:
    """The part of an event loop that has the time, turned by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, ring: Callable[[], None]) -> Timer:
        self.timers.append(Timer(when, ring))
        return self.timers[-1]

    def turn_to(self, now: float) -> None:
        while due := [timer for timer in self.timers if timer.when <= now and not timer.over]:
            first = min(due, key=lambda timer: timer.when)
            self.now, first.over = first.when, True
            first.ring()
        self.now = now

    @property
    def waiting(self) -> int:
        return sum(not timer.over for timer in self.timers)


class Timer:
    def __init__(self, when: float, ring: Callable[[], None]) -> None:
        self.when, self.ring, self.over = when, ring, False

    def cancel(self) -> None:
        self.over = True


class Recorder:
    """Deadlines on a loop turned by hand, and who expired."""

    def __init__(self) -> None:
        self.loop = TurnedLoop()
        self.expired: list[str] = []
        self.deadlines = Deadlines(self.loop, self._expire)  # type: ignore[arg-type]
        self._futures = asyncio.new_event_loop()

    def _expire(self, exchange: Exchange) -> None:
        self.expired.append(exchange.method)
        exchange.abandon()

    def add(self, name: str, deadline: float) -> Exchange:
        exchange = Exchange(name, b"", b"", deadline, self._futures.create_future())
        self.deadlines.add(exchange)
        return exchange

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._futures.close()


def test_calls_expire_in_the_order_of_their_deadlines_and_not_before() -> None:
    with Recorder() as recorder:
        for name, deadline in (("late", 3.0), ("early", 1.0), ("middle", 2.0)):
            recorder.add(name, deadline)
        recorder.loop.turn_to(0.999)
        assert recorder.expired == []
        recorder.loop.turn_to(2.0)
        assert recorder.expired == ["early", "middle"]
        recorder.loop.turn_to(3.0)
        assert recorder.expired == ["early", "middle", "late"]


def test_a_call_that_ended_does_not_expire() -> None:
    with Recorder() as recorder:
        recorder.add("ended", 1.0).abandon()
        recorder.loop.turn_to(2.0)
        assert recorder.expired == []
        assert len(recorder.deadlines) == 0


def test_many_calls_share_one_timer() -> None:
    with Recorder() as recorder:
        for number in range(100):
            recorder.add("call", 10.0 - number * 0.01)
        assert recorder.loop.waiting == 1


def test_calls_that_ended_are_forgotten_long_before_their_deadlines() -> None:
    with Recorder() as recorder:
        for _ in range(10_000):
            recorder.add("ended", 3600.0).abandon()
        assert len(recorder.deadlines) <= 256


def test_a_call_without_end_needs_no_timer() -> None:
    with Recorder() as recorder:
        recorder.add("endless", float("inf"))
        assert recorder.loop.waiting == 0


def test_closing_leaves_no_timer() -> None:
    with Recorder() as recorder:
        recorder.add("call", 1.0)
        recorder.deadlines.close()
        recorder.loop.turn_to(2.0)
        assert recorder.expired == []
