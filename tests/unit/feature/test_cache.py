"""The cache against tables that are stepped by hand, and against a model of a store that tells of its changes."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Coroutine, Generator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.feature.online.cache import ENTRY_BYTES, CacheLimits, RowCache
from services.feature.online.table import PartlyUnavailable
from services.feature.settings import FeatureSettings
from services.mesh.settings import SettingsError, from_env
from services.resilience.errors import Unavailable

Rows = list[bytes | None]
MAX_AGE_S = 5.0
LIMITS = CacheLimits(max_entries=100, max_bytes=2**20, max_age_s=MAX_AGE_S)


class Ticks:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Answer:
    """Awaited by a fetch; the test says when it is there, and what it is."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        self.rows: Rows | Exception | None = None

    def __await__(self) -> Generator[None, None, Rows]:
        while self.rows is None:
            yield
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


class HandTable:
    """Answers when told to. asked: what is under way or was, oldest first."""

    def __init__(self) -> None:
        self.asked: list[Answer] = []

    async def fetch(self, keys: Sequence[str], timeout_s: float) -> Rows:
        self.asked.append(Answer(keys))
        return await self.asked[-1]


class Fetch:
    """One `RowCache.fetch`, stepped without an event loop. answer: what the table was asked, None for nothing."""

    def __init__(self, cache: RowCache, table: HandTable, *keys: str, requests: Sequence[Sequence[str]] = ()) -> None:
        self._running: Coroutine[Any, Any, Rows] = cache.fetch(keys, 1.0, requests)
        self.rows: Rows | None = None
        before = len(table.asked)
        self._step()
        self.answer = table.asked[before] if len(table.asked) > before else None

    def reply(self, *rows: bytes | None) -> Rows:
        assert self.answer is not None
        self.answer.rows = list(rows)
        self._step()
        assert self.rows is not None
        return self.rows

    def fail(self, error: Exception) -> None:
        assert self.answer is not None
        self.answer.rows = error
        self._step()

    def close(self) -> None:
        self._running.close()

    def _step(self) -> None:
        try:
            self._running.send(None)
        except StopIteration as done:
            self.rows = done.value


@pytest.fixture
def clock() -> Ticks:
    return Ticks()


@pytest.fixture
def table() -> HandTable:
    return HandTable()


def following(table: HandTable, clock: Ticks, limits: CacheLimits = LIMITS) -> RowCache:
    cache = RowCache(table, limits, clock)
    cache.follow()
    cache.renew(1e9)
    return cache


@pytest.fixture
def cache(table: HandTable, clock: Ticks) -> RowCache:
    return following(table, clock)


def read(cache: RowCache, table: HandTable, **rows: bytes | None) -> Rows:
    """One fetch of these keys; those the table is asked for have these rows."""
    fetch = Fetch(cache, table, *rows)
    if fetch.answer is None:
        assert fetch.rows is not None
        return fetch.rows
    return fetch.reply(*(rows[key] for key in fetch.answer.keys))


def keep(cache: RowCache, table: HandTable, **rows: bytes | None) -> None:
    for _ in range(2):
        read(cache, table, **rows)


def test_a_key_that_was_read_twice_is_served_without_asking_the_table(cache: RowCache, table: HandTable) -> None:
    read(cache, table, a=b"1")
    assert cache.peek(["a"]) is None
    read(cache, table, a=b"1")
    assert cache.peek(["a"]) == [b"1"]
    assert Fetch(cache, table, "a", "a").rows == [b"1", b"1"]
    assert len(table.asked) == 2


def test_that_there_is_no_row_is_kept_and_invalidated_too(cache: RowCache, table: HandTable) -> None:
    keep(cache, table, a=None)
    assert cache.peek(["a"]) == [None]
    cache.invalidate(["a"])
    assert cache.peek(["a"]) is None


def test_only_absent_keys_are_asked_for_and_the_order_is_kept(cache: RowCache, table: HandTable) -> None:
    keep(cache, table, b=b"2")
    assert cache.peek(["a", "b"]) is None
    fetch = Fetch(cache, table, "a", "b", "c")
    assert fetch.answer is not None
    assert fetch.answer.keys == ["a", "c"]
    assert fetch.reply(b"1", None) == [b"1", b"2", None]


def test_a_row_whose_key_changed_while_it_was_read_is_answered_but_not_kept(cache: RowCache, table: HandTable) -> None:
    read(cache, table, a=b"old", b=b"1")
    fetch = Fetch(cache, table, "a", "b")
    cache.invalidate(["a"])
    assert fetch.reply(b"old", b"1") == [b"old", b"1"]
    assert cache.peek(["a"]) is None
    assert cache.peek(["b"]) == [b"1"]


@pytest.mark.parametrize("end", ["drop", "lose"])
def test_nothing_that_was_under_way_when_changes_went_untold_is_kept(
    cache: RowCache, table: HandTable, end: str
) -> None:
    keep(cache, table, a=b"old")
    read(cache, table, b=b"old")
    fetch = Fetch(cache, table, "b")
    getattr(cache, end)()
    cache.follow()
    cache.renew(1e9)
    fetch.reply(b"old")
    assert cache.peek(["a"]) is cache.peek(["b"]) is None
    assert cache.statistics[4:] == (1, 0, 0)


def test_a_read_that_was_sent_before_changes_are_told_is_not_kept(table: HandTable, clock: Ticks) -> None:
    cache = following(table, clock)
    read(cache, table, a=b"old")
    cache.lose()
    fetch = Fetch(cache, table, "a")
    cache.follow()
    cache.renew(1e9)
    fetch.reply(b"old")
    assert cache.peek(["a"]) is None


def test_of_two_reads_at_once_the_later_one_stays_whichever_is_answered_last(
    cache: RowCache, table: HandTable, clock: Ticks
) -> None:
    read(cache, table, a=b"0")
    earlier = Fetch(cache, table, "a")
    clock.now += 0.001
    later = Fetch(cache, table, "a")
    later.reply(b"2")
    earlier.reply(b"1")
    assert cache.peek(["a"]) == [b"2"]


def test_past_its_lease_nothing_is_served_and_with_a_new_one_all_is(
    cache: RowCache, table: HandTable, clock: Ticks
) -> None:
    keep(cache, table, a=b"1")
    cache.renew(1.0)
    clock.now = 1.0
    assert cache.peek(["a"]) is None
    late = Fetch(cache, table, "a")
    assert late.answer is not None
    late.reply(b"1")
    cache.renew(1.5)
    assert cache.peek(["a"]) == [b"1"]


def test_a_row_is_used_no_longer_than_max_age_from_sending_its_read(
    cache: RowCache, table: HandTable, clock: Ticks
) -> None:
    read(cache, table, a=b"1")
    fetch = Fetch(cache, table, "a")
    clock.now = 3.0
    fetch.reply(b"1")
    assert cache.peek(["a"]) == [b"1"]
    clock.now = MAX_AGE_S
    assert cache.peek(["a"]) is None
    read(cache, table, a=b"2")  # asked for before: no second read is needed
    assert cache.peek(["a"]) == [b"2"]


def test_a_failed_or_abandoned_read_leaves_nothing_behind(cache: RowCache, table: HandTable) -> None:
    keep(cache, table, a=b"1")
    read(cache, table, b=b"2")
    failing, abandoned = Fetch(cache, table, "a", "b"), Fetch(cache, table, "a", "b")
    with pytest.raises(Unavailable):
        failing.fail(Unavailable("gone"))
    abandoned.close()
    assert cache.peek(["a"]) == [b"1"]
    assert cache.peek(["b"]) is None
    assert cache._reads == {}


def test_a_scan_does_not_displace_what_is_asked_for_often(cache: RowCache, table: HandTable) -> None:
    hot = [f"hot{i}" for i in range(100)]
    for key in hot:
        keep(cache, table, **{key: b"1"})
    for i in range(0, 10_000, 50):
        read(cache, table, **{f"scan{j}": b"x" for j in range(i, i + 50)})
    for i in range(10_000):
        read(cache, table, **{f"slow-scan{i}": b"x"})
    assert cache.peek(hot) == [b"1"] * 100
    assert cache.statistics.evictions == 0


def test_a_request_for_many_keys_is_a_scan_until_most_of_a_sample_is_known(cache: RowCache, table: HandTable) -> None:
    rows = {f"k{i}": b"%d" % i for i in range(96)}
    asked = 0
    while cache.peek(list(rows)) is None:
        read(cache, table, **rows)
        asked += 1
    assert cache.peek(list(rows)) == list(rows.values())
    assert asked == 3  # to meet the sample, to meet the rest, to read what was met

    some_new = rows | {f"k{i}": b"new" for i in range(0, 96, 6)}
    mostly_new = {f"{key}-elsewhere" if i % 6 else key: b"new" for i, key in enumerate(rows)}
    cache.invalidate([f"k{i}" for i in range(0, 96, 6)])
    first, second = Fetch(cache, table, *some_new), Fetch(cache, table, *mostly_new)
    assert first.answer is not None
    assert second.answer is not None
    assert first.answer.keys == [f"k{i}" for i in range(0, 96, 6)]
    assert second.answer.keys == list(mostly_new)


def test_a_row_of_many_whose_key_changed_while_they_were_read_is_not_kept(cache: RowCache, table: HandTable) -> None:
    rows = dict.fromkeys([f"k{i}" for i in range(40)], b"old")
    for _ in range(2):
        read(cache, table, **rows)
    fetch = Fetch(cache, table, *rows)
    cache.invalidate(["k7"])
    fetch.reply(*[b"old"] * len(fetch.answer.keys if fetch.answer else []))
    assert [key for key in rows if cache.peek([key]) is None] == ["k7"]


def test_requests_for_few_keys_are_not_taken_for_a_scan_where_they_are_read_together(
    cache: RowCache, table: HandTable
) -> None:
    few = [[f"a{i}", f"b{i}"] for i in range(20)]
    scans = [[f"scan{i}" for i in range(start, start + 60)] for start in (0, 60, 120)]
    for scan in scans[:2]:
        keys = [key for request in [*few, scan] for key in request]
        fetch = Fetch(cache, table, *keys, requests=[*few, scan])
        assert fetch.reply(*map(str.encode, keys)) == list(map(str.encode, keys))
    assert all(cache.peek(request) == list(map(str.encode, request)) for request in few)
    assert cache.statistics.entries == 40

    fetch = Fetch(cache, table, *few[0], *scans[2], requests=[few[0], scans[2]])
    assert fetch.answer is not None
    assert fetch.answer.keys == scans[2]
    assert fetch.reply(*map(str.encode, scans[2])) == [b"a0", b"b0", *map(str.encode, scans[2])]


def test_where_room_is_short_what_was_not_used_leaves_first(table: HandTable, clock: Ticks) -> None:
    cache = following(table, clock, CacheLimits(max_entries=4))
    for key in "abcd":
        keep(cache, table, **{key: b"1"})
    assert cache.peek(["a", "c"]) is not None
    for key in "ef":
        keep(cache, table, **{key: b"1"})
    assert [key for key in "abcdef" if cache.peek([key])] == ["a", "c", "e", "f"]


def test_bytes_are_bounded_and_a_huge_row_is_not_kept(table: HandTable, clock: Ticks) -> None:
    limits = CacheLimits(max_entries=10_000, max_bytes=2**20)
    cache = following(table, clock, limits)
    for i in range(0, 1000, 10):
        keep(cache, table, **{f"k{j}": bytes(4000) for j in range(i, i + 10)})
        assert cache.statistics.bytes <= limits.max_bytes
    assert 200 < cache.statistics.entries < 262
    before = cache.statistics.entries
    keep(cache, table, huge=bytes(100_000))
    assert cache.peek(["huge"]) is None
    assert cache.statistics.entries == before


async def test_where_a_part_of_the_table_fails_what_is_here_stands_in_its_place(clock: Ticks) -> None:
    class Halved:
        """Has only keys that start with "a"."""

        async def fetch(self, keys: Sequence[str], timeout_s: float) -> Rows:
            rows: Rows = [b"1" if key.startswith("a") else None for key in keys]
            if failed := {key for key in keys if not key.startswith("a")}:
                raise PartlyUnavailable("a node is away", rows, failed)
            return rows

    cache = RowCache(Halved(), LIMITS, clock)
    cache.follow()
    cache.renew(1e9)
    for _ in range(2):
        await cache.fetch(["a1", "a2"], 1.0)
    with pytest.raises(PartlyUnavailable, match="a node is away") as caught:
        await cache.fetch(["a1", "b1", "a2", "a3"], 1.0)
    assert (caught.value.values, caught.value.failed) == ([b"1", None, b"1", b"1"], {"b1"})


def test_statistics_count_what_happened(cache: RowCache, table: HandTable) -> None:
    keep(cache, table, a=b"1", b=None)
    cache.peek(["a", "b"])
    cache.peek(["a", "elsewhere"])
    read(cache, table, a=b"1", c=b"3")
    cache.invalidate(["a", "unknown"])
    size = ENTRY_BYTES + sys.getsizeof("b") + sys.getsizeof(None)
    assert cache.statistics == (3, 5, 1, 0, 0, 1, size)


def test_without_tracking_every_read_goes_to_the_table(table: HandTable, clock: Ticks) -> None:
    cache = RowCache(table, LIMITS, clock)
    for _ in range(3):
        keep(cache, table, a=b"1")
    assert len(table.asked) == 6
    assert cache.peek(["a"]) is None
    assert cache.statistics == (0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("CACHE_ENTRIES", "-1", "TENFOLD_CACHE_ENTRIES must be at least 0, got -1"),
        ("CACHE_BYTES", "1000", "TENFOLD_CACHE_BYTES must be at least 1048576, got 1000"),
        ("CACHE_MAX_AGE_S", "0", "TENFOLD_CACHE_MAX_AGE_S must be above 0 s, got 0.0"),
        ("CACHE_MAX_AGE_S", "inf", "max_age_s must be above 0 s and finite, got inf"),
    ],
)
def test_cache_settings_that_cannot_be_used_are_named(name: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        from_env(FeatureSettings, ENVIRON | {f"TENFOLD_{name}": value})


def test_no_entries_turn_the_cache_off() -> None:
    assert from_env(FeatureSettings, ENVIRON | {"TENFOLD_CACHE_ENTRIES": "0"}).cache_limits() is None
    limits = from_env(FeatureSettings, ENVIRON | {"TENFOLD_CACHE_ENTRIES": "7"}).cache_limits()
    assert limits == CacheLimits(7, 64 * 2**20, 5.0)


ENVIRON = {
    "TENFOLD_MESH_FILE": "tenfold.toml",
    "TENFOLD_LISTEN": "unix:/tmp/f",
    "TENFOLD_INSTANCE": "feature-0",
    "TENFOLD_STORE": "unix:///tmp/v.sock",
}


# what may happen, as often as it is named
MOVES = ("read", "run", "run", "answer", "answer", "peek", "peek", "hear", "hear", "ping") * 8 + ("write",) * 2
TROUBLES = (
    ("flush",),
    ("cut", "notice", "notice", "connect", "connect"),
    ("swap", "swap", "wait"),
    ("fail",),
    ("wait",),
)
LEASE_S = 0.5


class World:
    """A store with two links to it, each in order and neither in step with the other.

    Values are versions that only grow; a key without a row counts as a version too. `history` holds, per key, when it
    got which version. Some writes are never told ("swap"), as if the store had moved: only age bounds those.
    """

    def __init__(self, seed: int) -> None:
        self.random, self.clock, self.table = random.Random(seed), Ticks(), HandTable()
        self.keys = [f"k{i}" for i in range(self.random.choice([1, 2, 6, 24]))]
        self.limits = CacheLimits(max_entries=self.random.choice([2, 4, 100]), max_bytes=2**20, max_age_s=MAX_AGE_S)
        self.cache = RowCache(self.table, self.limits, self.clock)
        self.version = 0
        self.history: dict[str, list[tuple[float, int, bool]]] = {key: [(-1e9, 0, True)] for key in self.keys}
        self.at_least = dict.fromkeys(self.keys, 0)  # the last version that the cache was told of
        self.link: deque[tuple[str, Any]] | None = None  # what was told and not yet heard; None: cut
        self.known_cut = True
        self.unsent: deque[Fetch] = deque()
        self.unheard: deque[tuple[Fetch, Rows]] = deque()
        self.moves = MOVES + sum(self.random.sample(TROUBLES, self.random.randint(0, 3)), ())
        self.served = 0
        self.connect()

    def play(self, moves: int) -> None:
        for _ in range(moves):
            getattr(self, self.random.choice(self.moves))()
            self.clock.now += self.random.choice([0.0, 0.0, 0.001, 0.01])
            statistics = self.cache.statistics
            assert statistics.entries <= self.limits.max_entries
            assert statistics.bytes == sum(entry.size for entry in self.cache._entries.values())

    def some(self) -> list[str]:
        """Few keys, sometimes many."""
        most = len(self.keys) if self.random.random() < 0.2 else min(3, len(self.keys))
        return self.random.sample(self.keys, self.random.randint(1, most))

    def now_stored(self, key: str) -> bytes | None:
        version = self.history[key][-1][1]
        return None if version % 5 == 0 else b"%d" % version

    def read(self) -> None:
        keys = self.some()
        fetch = Fetch(self.cache, self.table, *keys)
        if fetch.answer is None:
            self.check(keys, fetch.rows)
        else:
            self.unsent.append(fetch)

    def peek(self) -> None:
        keys = self.some()
        self.check(keys, self.cache.peek(keys))

    def check(self, keys: list[str], rows: Rows | None) -> None:
        if rows is None:
            return
        assert not self.known_cut
        for key, row in zip(keys, rows, strict=True):
            self.served += 1
            told = [entry for entry in self.history[key] if entry[2]]
            in_lease = max(version for at, version, _ in told if at <= self.clock.now - LEASE_S)
            aged = max(version for at, version, _ in self.history[key] if at <= self.clock.now - MAX_AGE_S)
            least = max(self.at_least[key], in_lease, aged)
            right = {v for _, v, _ in self.history[key] if v >= least}
            assert row in {None if v % 5 == 0 else b"%d" % v for v in right}, (key, row, least)

    def run(self) -> None:
        """The store gets to the next read."""
        if self.unsent:
            fetch = self.unsent.popleft()
            assert fetch.answer is not None
            self.unheard.append((fetch, [self.now_stored(key) for key in fetch.answer.keys]))

    def answer(self) -> None:
        if self.unheard:
            fetch, rows = self.unheard.popleft()
            fetch.reply(*rows)

    def fail(self) -> None:
        if self.unheard:
            fetch, _ = self.unheard.popleft()
            with pytest.raises(Unavailable):
                fetch.fail(Unavailable("gone"))

    def change(self, keys: list[str], *, told: bool = True) -> dict[str, int]:
        for key in keys:
            self.version += 1
            self.history[key].append((self.clock.now, self.version, told))
        return {key: self.history[key][-1][1] for key in keys}

    def write(self) -> None:
        changed = self.change(self.some())
        if self.link is not None:
            self.link.append(("invalidate", changed))

    def swap(self) -> None:
        self.change(self.some(), told=False)

    def flush(self) -> None:
        changed = self.change(self.keys)
        if self.link is not None:
            self.link.append(("drop", changed))

    def ping(self) -> None:
        if self.link is not None and not any(what == "pong" for what, _ in self.link):
            self.link.append(("pong", self.clock.now))

    def hear(self) -> None:
        if not self.link or self.known_cut:
            return
        what, told = self.link.popleft()
        if what == "pong":
            self.cache.renew(told + LEASE_S)
            return
        if what == "drop":
            self.cache.drop()
        else:
            self.cache.invalidate(list(told))
        self.at_least.update(told)

    def cut(self) -> None:
        self.link = None

    def notice(self) -> None:
        if self.link is None:
            self.known_cut = True
            self.cache.lose()

    def connect(self) -> None:
        if self.link is None and self.known_cut:
            self.link, self.known_cut = deque(), False
            self.cache.follow()

    def wait(self) -> None:
        self.clock.now += self.random.choice([0.1, LEASE_S, MAX_AGE_S])


@given(st.integers(0, 2**32))
def test_no_order_of_answers_and_changes_serves_what_was_told_to_be_old(seed: int) -> None:
    World(seed).play(400)


def test_the_model_serves_from_memory_often_enough_to_mean_something() -> None:
    worlds = [World(seed) for seed in range(20)]
    for world in worlds:
        world.play(400)
    assert sum(world.served for world in worlds) > 500
