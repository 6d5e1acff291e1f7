"""The event log in a real Valkey that keeps an append-only file."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest

from services.feature.online.valkey import Valkey
from services.feature.stream.log import (
    MAX_SEQUENCE,
    Appended,
    EventLog,
    Group,
    LogFull,
    Logged,
    NotDurable,
    Promise,
    check_durable,
)
from services.resilience.errors import CallError
from tests.conftest import ValkeyProcess

LONG_S = 10.0
NOW_US = 1_700_000_000_000_000


def event(sequence: int, **values: float) -> Logged:
    return Logged(sequence, NOW_US, NOW_US + sequence % 1000, {"origin": "JFK"}, {"kind": "x"}, values)


def group(*sequences: int, watermark_us: int = 0) -> Group:
    return Group([event(sequence) for sequence in sequences], watermark_us)


@pytest.fixture
async def client(durable_valkey: ValkeyProcess) -> AsyncIterator[Valkey]:
    async with Valkey(durable_valkey.url) as client:
        await client.connected(LONG_S)
        yield client


@pytest.fixture
def log(client: Valkey) -> EventLog:
    return EventLog(client, "test")


async def sequences(log: EventLog, source: str = "s") -> list[int]:
    """What the log holds, in order; their positions must grow by one."""
    found: list[int] = []
    position = await log.first_position(source, LONG_S) - 1
    while entries := (await log.read({source: position}, 1000, 0, LONG_S)).get(source):
        assert [entry.position for entry in entries] == list(range(position + 1, position + 1 + len(entries)))
        position = entries[-1].position
        found += [entry.event.sequence for entry in entries if entry.event is not None]
    return found


async def append(log: EventLog, *groups: Group) -> list[Appended | LogFull]:
    return await log.append("s", groups, LONG_S)


async def test_an_event_comes_back_as_it_was_sent(log: EventLog) -> None:
    sent = Logged(MAX_SEQUENCE, 1, 2**53, {"origin": "Zürich"}, {}, {"a": -0.0, "b": float("inf")})
    assert await append(log, Group([sent])) == [Appended(1, 0)]
    assert await log.read({"s": 0}, 10, 0, LONG_S) == {"s": [(1, sent)]}


async def test_a_number_counts_once_within_a_group_between_groups_and_between_calls(log: EventLog) -> None:
    assert await append(log, group(5, 3, 5), group(3, 9)) == [Appended(2, 1), Appended(1, 1)]
    assert await append(log, group(9, 5, 3), group(1)) == [Appended(0, 3), Appended(1, 0)]
    assert await sequences(log) == [5, 3, 9, 1]


async def test_numbers_far_apart_and_next_to_each_other_are_told_apart(log: EventLog) -> None:
    numbers = [1, 2**16 - 1, 2**16, 2**16 + 1, 2**32, 2**53, 2**53 + 1, 2**62, MAX_SEQUENCE - 1, MAX_SEQUENCE]
    assert await append(log, group(*numbers)) == [Appended(len(numbers), 0)]
    assert await append(log, group(*numbers)) == [Appended(0, len(numbers))]
    assert await sequences(log) == numbers


async def test_sources_have_numbers_and_positions_of_their_own(log: EventLog) -> None:
    await log.append("a", [group(1, 2)], LONG_S)
    await log.append("b", [group(2)], LONG_S)
    assert (await sequences(log, "a"), await sequences(log, "b")) == ([1, 2], [2])
    assert [await log.last_position(name, LONG_S) for name in ("a", "b", "c")] == [2, 1, 0]


async def test_a_page_of_numbers_that_is_full_shrinks_to_a_word_and_is_still_known(
    log: EventLog, client: Valkey
) -> None:
    everything = list(range(1, 2**16))
    random.Random(1).shuffle(everything)
    for start in range(0, len(everything), 8192):
        await log.append("s", [group(*everything[at : at + 512]) for at in range(start, start + 8192, 512)], LONG_S)
    assert await client.call("KEYS", "tf:test:seen:*", timeout_s=LONG_S) == [b"tf:test:seen:s:full"]
    assert await append(log, group(1, 40_000, 2**16 - 1, 2**16)) == [Appended(1, 3)]


async def test_a_full_log_changes_nothing_and_still_knows_what_it_has(client: Valkey) -> None:
    log = EventLog(client, "test", max_events=5)
    answers = await append(log, group(1, 2, 3), group(3, 4, 5, 6), group(7), group(1, watermark_us=9))
    assert answers[0] == Appended(3, 0)
    assert all(isinstance(answer, LogFull) for answer in answers[1:])  # what follows must not overtake
    assert "is full: it holds 3 events and may hold 5" in str(answers[1])
    assert await append(log, group(3, 4, 5)) == [Appended(2, 1)]
    assert await append(log, group(1, 2, 3, 4, 5)) == [Appended(0, 5)]
    assert isinstance((await append(log, group(6)))[0], LogFull)
    assert await log.promise("s", LONG_S) == Promise(0, 0)
    assert await log.trim("s", 2, LONG_S) == 2
    assert await append(log, group(6, 1)) == [Appended(1, 1)]  # trimmed, and not forgotten
    assert await sequences(log) == [3, 4, 5, 6]


async def test_a_log_that_is_full_in_one_call_refuses_the_calls_behind_it(client: Valkey) -> None:
    log = EventLog(client, "test", max_events=600)
    first, second = group(*range(1, 512)), group(*range(512, 900))
    answers = await append(log, first, second, group(1000))
    assert answers[0] == Appended(511, 0)
    assert [type(answer) for answer in answers[1:]] == [LogFull, LogFull]


async def test_a_promise_holds_from_the_events_before_it_and_never_goes_back(log: EventLog) -> None:
    await append(log, group(1, 2, watermark_us=100), group(3))
    assert await log.promise("s", LONG_S) == Promise(100, 2)
    await append(log, group(watermark_us=50))
    assert await log.promise("s", LONG_S) == Promise(100, 2)
    await append(log, group(watermark_us=2**53))
    assert await log.promise("s", LONG_S) == Promise(2**53, 3)


async def test_an_entry_that_is_none_is_told_as_such(log: EventLog, client: Valkey) -> None:
    await append(log, group(1))
    for position, entry in enumerate((b"", b"\x01junk", b"\x02", b"\x01\x96\x00\x01\x01\x80\x80\x80"), start=2):
        await client.call("XADD", "tf:test:log:s", f"{position}-0", "e", entry, timeout_s=LONG_S)
    found = (await log.read({"s": 0}, 10, 0, LONG_S))["s"]
    assert [entry.event is None for entry in found] == [False, True, True, True, True]


async def test_a_reader_that_waits_has_an_event_when_it_comes(log: EventLog, durable_valkey: ValkeyProcess) -> None:
    async with Valkey(durable_valkey.url) as waiting:
        await waiting.connected(LONG_S)
        reading = asyncio.create_task(EventLog(waiting, "test").read({"s": 0, "t": 0}, 10, LONG_S, LONG_S))
        await asyncio.sleep(0.05)
        await log.append("t", [group(4)], LONG_S)
        assert list(await reading) == ["t"]
        assert await EventLog(waiting, "test").read({"s": 0}, 10, 0.001, LONG_S) == {}


async def test_only_a_store_that_keeps_what_it_acknowledges_is_durable(client: Valkey, valkey: str) -> None:
    await check_durable(client, LONG_S)
    await client.call("CONFIG", "SET", "appendfsync", "everysec", timeout_s=LONG_S)
    with pytest.raises(NotDurable, match="appendfsync always, got 'everysec'"):
        await check_durable(client, LONG_S)
    await client.call("CONFIG", "SET", "appendfsync", "always", timeout_s=LONG_S)
    await client.call("CONFIG", "SET", "maxmemory", 2**30, "maxmemory-policy", "allkeys-lru", timeout_s=LONG_S)
    with pytest.raises(NotDurable, match="must not evict"):
        await check_durable(client, LONG_S)
    async with Valkey(valkey) as forgetful:
        await forgetful.connected(LONG_S)
        with pytest.raises(NotDurable, match="appendonly yes, got 'no'"):
            await check_durable(forgetful, LONG_S)


async def test_a_store_without_memory_refuses_and_nothing_is_half_done(log: EventLog, client: Valkey) -> None:
    await append(log, group(1))
    await client.call("CONFIG", "SET", "maxmemory", 1, timeout_s=LONG_S)
    with pytest.raises(CallError):
        await append(log, group(2, 3))
    await client.call("CONFIG", "SET", "maxmemory", 0, timeout_s=LONG_S)
    assert await append(log, group(2, 3)) == [Appended(2, 0)]
    assert await sequences(log) == [1, 2, 3]


async def test_what_was_acknowledged_is_there_once_after_the_store_is_killed_at_any_moment(
    durable_valkey: ValkeyProcess,
) -> None:
    chance = random.Random(7)
    acknowledged: set[int] = set()
    async with Valkey(durable_valkey.url) as client:
        log = EventLog(client, "test")
        next_sequence = 1
        unsure: list[Group] = []
        for _ in range(6):
            await client.connected(LONG_S)
            for again in unsure:
                await append(log, again)
            acknowledged |= {event.sequence for again in unsure for event in again.events}
            unsure = []
            killing = asyncio.create_task(_kill_soon(durable_valkey, chance.uniform(0.02, 0.4)))
            while not unsure:
                groups = [group(*range(start, start + 7)) for start in range(next_sequence, next_sequence + 70, 7)]
                next_sequence += 70
                unsure = await _tried(log, groups, acknowledged)
            await killing
            durable_valkey.start()
        await client.connected(LONG_S)
        found = await sequences(log)
        assert len(found) == len(set(found))
        assert acknowledged <= set(found)
        assert len(acknowledged) >= 100
        assert await append(log, *unsure) is not None
        assert sorted(await sequences(log)) == list(range(1, next_sequence))


async def _kill_soon(process: ValkeyProcess, after_s: float) -> None:
    await asyncio.sleep(after_s)
    await asyncio.to_thread(process.kill)


async def _tried(log: EventLog, groups: Sequence[Group], acknowledged: set[int]) -> list[Group]:
    """Appends them all at once; those that got no answer."""
    answers = await asyncio.gather(*(append(log, one) for one in groups), return_exceptions=True)
    unsure = []
    for one, answer in zip(groups, answers, strict=True):
        if isinstance(answer, BaseException):
            assert isinstance(answer, CallError)
            unsure.append(one)
        else:
            acknowledged |= {event.sequence for event in one.events}
    return unsure
