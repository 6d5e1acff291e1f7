"""A Table in a Redis Cluster or Valkey Cluster, over one connection to each master.

A command may only name keys of one slot. Keys are therefore grouped by slot, and the groups of a node leave together;
nodes work in parallel. While a slot moves from node to node, a key of it is found by following what the nodes answer:
MOVED (for good; the map of slots is read again soon) and ASK (this once).

A node that is down fails its own keys and no others. The map is then read again, at most once a second, so that a
replica that takes over is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from services.feature.online.slots import SLOTS, Node, owners, redirection, slot_of
from services.feature.online.table import PartlyUnavailable
from services.feature.online.valkey import Address, CommandError, Reply, Valkey, Word
from services.feature.online.valkey_table import (
    KEEP_NEWEST,
    SCRIPTS,
    SWAP,
    listed,
    load_parts,
    map_of,
    paired,
    swap_words,
    sweep,
)
from services.resilience.errors import CallError, DeadlineExceeded, Unavailable

log = logging.getLogger(__name__)

SCHEMES = ("redis+cluster", "rediss+cluster")
BETWEEN_READS_S = 1.0  # of the map, however many nodes redirect or fail
READ_EVERY_S = 30.0  # a cluster that changed without anybody being redirected
_FIRST_READ_PAUSE_S = 0.1
_READ_TIMEOUT_S = 1.0
_MOST_ROUNDS = 6  # of one call: a slot that moves meanwhile costs three
_ROUND_PAUSE_S = 0.005
_LOADS_AT_ONCE = 4
_MOST_SWEEPS = 3  # of a cluster whose slots move while it is swept

Command = tuple[Word, ...]


class _Group(NamedTuple):
    """Keys of one slot, as places in the keys of a call. ask: where to look for them this once."""

    slot: int
    places: Sequence[int]
    ask: Node | None = None

    def alone(self, ask: Node | None) -> list[_Group]:
        """A moving slot answers for several keys only if all are on one side."""
        return [_Group(self.slot, [place], ask) for place in self.places]


class ClusterTable:
    """Open from `async with` until its end. Belongs to one event loop."""

    def __init__(self, url: str) -> None:
        """url: see seeds_of. Raises ValueError."""
        self._seeds = seeds_of(url)
        self._owners: list[Node | None] = [None] * SLOTS
        self._nodes: dict[Node, Valkey] = {}
        self._new: set[Node] = set()  # nodes that were never connected yet
        self._known = asyncio.Event()
        self._stale = asyncio.Event()
        self._unknown_because = "not read yet"
        self._moves = 0  # of slots, as far as noticed
        self._keeper: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return "the cluster at " + ",".join(map(str, self._seeds))

    async def __aenter__(self) -> ClusterTable:
        self._keeper = asyncio.get_running_loop().create_task(self._keep_map())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._keeper is not None
        self._keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._keeper
        nodes, self._nodes = self._nodes, {}
        for valkey in nodes.values():
            await valkey.__aexit__(None, None, None)

    async def connected(self, timeout_s: float) -> None:
        """Returns when it is known where keys are. Raises Unavailable saying why it is not after timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._known.wait()
        except TimeoutError:
            raise self._unknown() from None

    async def ping(self, timeout_s: float) -> None:
        """Returns when any node answers: those that are there can serve."""
        if not self._nodes:
            raise self._unknown()
        failure: CallError | None = None
        for valkey in list(self._nodes.values()):
            try:
                await valkey.call("PING", timeout_s=timeout_s)
            except CallError as error:
                failure = error
            else:
                return
        assert failure is not None
        raise failure

    async def fetch(self, keys: Sequence[str], timeout_s: float) -> list[bytes | None]:
        """One MGET per slot."""
        values: list[bytes | None] = [None] * len(keys)

        def take(places: Sequence[int], reply: Reply) -> None:
            for place, value in zip(places, reply, strict=True):
                values[place] = value

        failures = await self._ask(keys, lambda places: ("MGET", *(keys[at] for at in places)), take, timeout_s)
        if failures:
            failed = {keys[place] for place in failures}
            error = next(iter(failures.values()))
            if len(failures) == len(keys):
                raise error
            raise PartlyUnavailable(f"{len(failed)} of {len(keys)} keys: {error}", values, failed) from error
        return values

    async def keep_newest(
        self, keys: Sequence[str], rows: Sequence[bytes], expiries_ms: Sequence[int], timeout_s: float
    ) -> int:
        kept = 0

        def command(places: Sequence[int]) -> Command:
            some_keys, some_rows = [keys[at] for at in places], [rows[at] for at in places]
            some_expiries = [expiries_ms[at] for at in places]
            return ("EVALSHA", KEEP_NEWEST.sha, len(places), *some_keys, *some_rows, *some_expiries)

        def take(_places: Sequence[int], reply: Reply) -> None:
            nonlocal kept
            kept += int(reply)

        deadline = time.monotonic() + timeout_s
        for part in load_parts(keys, rows):
            _raise_first(await self._ask(keys, command, take, deadline - time.monotonic(), range(len(keys))[part]))
        return kept

    async def load(self, keys: Sequence[str], rows: Sequence[bytes], timeout_s: float) -> None:
        """One MSET per slot, a few hundred rows at a time, a few times under way at once."""

        def command(places: Sequence[int]) -> Command:
            return ("MSET", *paired((keys[at], rows[at]) for at in places))

        deadline = time.monotonic() + timeout_s
        under_way = asyncio.Semaphore(_LOADS_AT_ONCE)

        async def load_part(part: slice) -> None:
            async with under_way:
                places = range(len(keys))[part]
                _raise_first(await self._ask(keys, command, _ignore, deadline - time.monotonic(), places))

        try:
            async with asyncio.TaskGroup() as tasks:
                for part in load_parts(keys, rows):
                    tasks.create_task(load_part(part))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def drop(self, prefix: str, timeout_s: float) -> int:
        """Sweeps every master, and again where slots moved meanwhile: a key may have moved from one not yet swept."""
        deadline = time.monotonic() + timeout_s

        async def unlink(found: Sequence[bytes], left_s: float) -> int:
            removed = 0

            def take(_places: Sequence[int], reply: Reply) -> None:
                nonlocal removed
                removed += int(reply)

            _raise_first(await self._ask(found, lambda places: ("UNLINK", *(found[at] for at in places)), take, left_s))
            return removed

        dropped = 0
        for _ in range(_MOST_SWEEPS):
            moves = self._moves
            masters = dict.fromkeys(owner for owner in self._owners if owner is not None)
            if not masters:
                raise self._unknown()
            for master in masters:
                left_s = deadline - time.monotonic()
                dropped += await sweep(await self._node(master, left_s), prefix, unlink, left_s)
            if moves == self._moves:
                return dropped
        raise Unavailable(f"slots of {self} kept moving while keys were removed")

    async def keys(self, prefix: str, timeout_s: float) -> AsyncIterator[list[str]]:
        deadline = time.monotonic() + timeout_s
        for master in dict.fromkeys(owner for owner in self._owners if owner is not None):
            left_s = deadline - time.monotonic()
            async for some in listed(await self._node(master, left_s), prefix, left_s):
                yield some

    async def read_map(self, name: str, timeout_s: float) -> dict[str, bytes]:
        return map_of(await self._ask_one(name, ("HGETALL", name), timeout_s))

    async def write_map(self, name: str, fields: Mapping[str, bytes], timeout_s: float) -> None:
        if fields:
            await self._ask_one(name, ("HSET", name, *paired(fields.items())), timeout_s)

    async def swap_map(
        self, name: str, before: Mapping[str, bytes | None], fields: Mapping[str, bytes], timeout_s: float
    ) -> bool:
        command = ("EVALSHA", SWAP.sha, 1, name, *swap_words(before, fields))
        return bool(await self._ask_one(name, command, timeout_s))

    async def _ask_one(self, key: str, command: Command, timeout_s: float) -> Reply:
        answer: list[Reply] = []
        _raise_first(await self._ask([key], lambda _: command, lambda _, reply: answer.append(reply), timeout_s))
        return answer[0]

    async def _ask(
        self,
        keys: Sequence[str] | Sequence[bytes],
        command: Callable[[Sequence[int]], Command],
        take: Callable[[Sequence[int], Reply], None],
        timeout_s: float,
        places: Sequence[int] | None = None,
    ) -> dict[int, CallError]:
        """Sends a command for the keys of each slot, and follows redirections; the error of each place that failed.

        command: made for some places in `keys`. take: told these places and the reply. places: all where None.
        """
        deadline = time.monotonic() + timeout_s
        by_slot: dict[int, list[int]] = defaultdict(list)
        for place in range(len(keys)) if places is None else places:
            by_slot[slot_of(keys[place])].append(place)
        groups = [_Group(slot, members) for slot, members in by_slot.items()]
        failures: dict[int, CallError] = {}
        for round_ in range(_MOST_ROUNDS):
            if round_ > 1:  # once redirected is normal; more often, a slot is moving just now
                await asyncio.sleep(min(_ROUND_PAUSE_S * round_, max(0.0, deadline - time.monotonic())))
            groups = await self._ask_round(groups, command, take, deadline, failures)
            if not groups:
                return failures
        error = Unavailable(f"slot {groups[0].slot} of {self} kept moving")
        return failures | {place: error for group in groups for place in group.places}

    async def _ask_round(
        self,
        groups: Sequence[_Group],
        command: Callable[[Sequence[int]], Command],
        take: Callable[[Sequence[int], Reply], None],
        deadline: float,
        failures: dict[int, CallError],
    ) -> list[_Group]:
        """Asks for each group once; those to be asked for again."""
        by_node: dict[Node, list[_Group]] = defaultdict(list)
        for group in groups:
            node = group.ask or self._owners[group.slot]
            if node is None:
                self._stale.set()
                failures |= dict.fromkeys(group.places, self._unknown())
            else:
                by_node[node].append(group)
        asks = [self._ask_node(node, theirs, command, deadline) for node, theirs in by_node.items()]
        replies = await _outcomes(asks)
        again: list[_Group] = []
        for (node, theirs), answers in zip(by_node.items(), replies, strict=True):
            if isinstance(answers, CallError):
                if isinstance(answers, (Unavailable, DeadlineExceeded)):
                    self._stale.set()
                for group in theirs:
                    failures |= dict.fromkeys(group.places, answers)
                continue
            for group, answer in zip(theirs, answers, strict=True):
                if isinstance(answer, CallError):
                    again += self._follow(node, group, answer, failures)
                else:
                    take(group.places, answer)
        return again

    async def _ask_node(
        self, node: Node, groups: Sequence[_Group], command: Callable[[Sequence[int]], Command], deadline: float
    ) -> list[Reply]:
        """The reply, or error, for each group; all commands leave together."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(f"{self} did not finish in time")
        commands: list[Command] = []
        wanted: list[int] = []
        for group in groups:
            if group.ask is not None:
                commands.append(("ASKING",))
            wanted.append(len(commands))
            commands.append(command(group.places))
        valkey = await self._node(node, left_s)
        replies = await valkey.pipeline(commands, left_s)
        answers = [replies[at] for at in wanted]
        if any(isinstance(answer, CommandError) and answer.code == "NOSCRIPT" for answer in answers):
            await valkey.pipeline([("SCRIPT", "LOAD", script.text) for script in SCRIPTS], left_s)
        return answers

    def _follow(self, node: Node, group: _Group, error: CallError, failures: dict[int, CallError]) -> Iterable[_Group]:
        """The groups to ask for again after an error; where there are none, the group has failed."""
        if isinstance(error, CommandError):
            if (told := redirection(error.told, node)) is not None:
                if told.ask:
                    return group.alone(told.node)
                self._moved(told.slot, told.node)
                return [_Group(group.slot, group.places)]
            if error.code == "TRYAGAIN":
                return group.alone(group.ask)
            if error.code == "NOSCRIPT":  # it has them by now
                return [group]
            self._stale.set()  # for example CLUSTERDOWN, or READONLY of a master that became a replica
        failures |= dict.fromkeys(group.places, error)
        return []

    def _moved(self, slot: int, node: Node) -> None:
        if self._owners[slot] != node:
            self._owners[slot] = node
            self._moves += 1
            self._stale.set()  # slots rarely move alone

    async def _node(self, node: Node, timeout_s: float) -> Valkey:
        """The connection to a node; of one that is new, when there is one. Raises Unavailable."""
        valkey = self._nodes.get(node)
        if valkey is None:
            if self._keeper is None or self._keeper.done():
                raise Unavailable(f"{self} is closed")
            # before anything waits, so that nobody else connects to it too
            valkey = self._nodes[node] = Valkey(self._address(node))
            self._new.add(node)
            await valkey.__aenter__()
        if node in self._new:
            try:
                await valkey.connected(min(timeout_s, _READ_TIMEOUT_S))
            finally:
                self._new.discard(node)  # from now on, no connection is an error at once
        return valkey

    def _address(self, node: Node) -> Address:
        return dataclasses.replace(self._seeds[0], host=node.host, port=node.port)

    def _unknown(self) -> Unavailable:
        return Unavailable(f"it is not known where keys of {self} are: {self._unknown_because}")

    async def _keep_map(self) -> None:
        """Reads the map of slots now, then whenever it is found wrong, and every while."""
        while True:
            self._stale.clear()
            try:
                await self._read_map()
            except (CallError, OSError) as error:
                if str(error) != self._unknown_because:
                    log.warning("map of slots not read", extra={"store": str(self), "reason": str(error)})
                self._unknown_because = str(error)
            if not self._known.is_set():
                await asyncio.sleep(_FIRST_READ_PAUSE_S * random.uniform(0.5, 1.0))
                continue
            await asyncio.sleep(BETWEEN_READS_S * random.uniform(1.0, 1.2))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READ_EVERY_S):
                    await self._stale.wait()

    async def _read_map(self) -> None:
        asked, reply = await self._ask_anyone()
        try:
            found = owners(reply, asked)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise Unavailable(f"{asked} answered CLUSTER SLOTS with something else: {error}") from None
        masters = dict.fromkeys(owner for owner in found if owner is not None)
        if not masters:
            raise Unavailable(f"{asked} knows no master of any slot")
        # connected before anyone is sent there
        await asyncio.gather(*(self._node(master, _READ_TIMEOUT_S) for master in masters), return_exceptions=True)
        if found != self._owners:
            self._moves += 1
            self._owners = found
            log.info("map of slots read", extra={"store": str(self), "masters": [str(master) for master in masters]})
        self._known.set()
        for node in [node for node, valkey in self._nodes.items() if node not in masters and valkey.idle]:
            await self._nodes.pop(node).__aexit__(None, None, None)

    async def _ask_anyone(self) -> tuple[Node, Reply]:
        """Who answered CLUSTER SLOTS, and what. Raises the last error where nobody did."""
        failure: CallError | None = None
        for node, valkey in random.sample(list(self._nodes.items()), len(self._nodes)):
            try:
                return node, await valkey.call("CLUSTER", "SLOTS", timeout_s=_READ_TIMEOUT_S)
            except CallError as error:
                failure = error
        for seed in random.sample(self._seeds, len(self._seeds)):
            try:
                async with Valkey(seed) as valkey:
                    await valkey.connected(_READ_TIMEOUT_S)
                    reply = await valkey.call("CLUSTER", "SLOTS", timeout_s=_READ_TIMEOUT_S)
                    return Node(seed.host, seed.port), reply
            except CallError as error:
                failure = error
        assert failure is not None
        raise failure


def seeds_of(url: str) -> list[Address]:
    """The nodes to begin with, of "redis+cluster://[user:password@]host:port[,host:port...]"; rediss+cluster for TLS.

    Raises ValueError saying what is allowed; the value is not repeated, as it may hold a password.
    """
    parts = urlsplit(url)
    allowed = "must be redis[s]+cluster://[user:password@]host:port[,host:port...]"
    if parts.scheme not in SCHEMES:
        raise ValueError(f"a cluster's URL {allowed}, got scheme {parts.scheme!r}")
    if parts.path.strip("/"):
        raise ValueError(f"a cluster's URL {allowed}, got a path; a cluster has one database")
    credentials, at, hosts = parts.netloc.rpartition("@")
    seeds = []
    for host in hosts.split(","):
        query = f"?{parts.query}" if parts.query else ""
        if not host:
            raise ValueError(f"a cluster's URL {allowed}, got an empty host")
        try:
            seeds.append(Address.parse(f"{parts.scheme.removesuffix('+cluster')}://{credentials}{at}{host}{query}"))
        except ValueError:
            raise ValueError(f"a cluster's URL {allowed}, got host {host!r}") from None
    return seeds


async def _outcomes(asks: Sequence[Coroutine[Any, Any, list[Reply]]]) -> list[list[Reply] | CallError]:
    """What each came to; at the same time where there are several."""

    async def outcome(ask: Coroutine[Any, Any, list[Reply]]) -> list[Reply] | CallError:
        try:
            return await ask
        except CallError as error:
            return error

    if len(asks) == 1:
        return [await outcome(asks[0])]
    return await asyncio.gather(*map(outcome, asks))


def _raise_first(failures: Mapping[int, CallError]) -> None:
    for failure in failures.values():
        raise failure


def _ignore(_places: Sequence[int], _reply: Reply) -> None:
    pass
