"""The online store in one DynamoDB table, billed by request or by provisioned capacity.

    key       S  partition key, the whole of it
    row       B  the packed row
    schema    B  the row's head up to its event time: magic, layout version and schema hash
    event_us  N  the row's event time, so that the server can compare what it cannot parse
    expires   N  the table's TTL attribute, seconds since 1970; absent for never
    field:x   B  field x of a named map, in the item of that name

Reads of rows are eventually consistent unless the URL says otherwise: half the price, and a row that is a second old
instead of current is what features are anyway. Maps are read consistently: they say how rows are to be read.

DynamoDB removes expired items when it finds the time, up to days later; here they count as absent at once. It decides
a conditional put in one step per item, and bills it whether or not the condition held.

Who writes waits for the answer, so writers slow down with a throttled table and only the number of tries is bounded.
Readers do not wait for one another, so their second tries come out of one budget of the table.

Tested against an emulator only (moto), never against the service. The emulator never throttles, so tests put a server
in front that does; every read is current, and expired items are never removed; a conditional put is not one step
where it serves several threads, so tests give it one; of limits it knows those of a batch but not those of an
expression, and of an item it measures other sizes than the service does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from services.feature.online.dynamocalls import Calls, ConditionFailed, Place, TableExists, connected
from services.feature.online.packed import EVENT_AT
from services.feature.online.table import HEAD_BYTES
from services.resilience.errors import DeadlineExceeded, Reason, Refused, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
Item = dict[str, Any]  # attribute name -> {"S" | "B" | "N": value}

MAX_ITEM_BYTES = 400 * 1024  # names and values
MAX_KEY_BYTES = 2048
# of one update of a map: an expression holds 300 operators and 4 KB
MAX_FIELDS = 250
MAX_COMPARED = 130
# of one call, as the service has them
_KEYS_PER_READ = 100
_ITEMS_PER_WRITE = 25
_KEYS_PER_SCAN = 1000

_READS_AT_ONCE = 32
_WRITES_AT_ONCE = 16
_MAX_FETCHES = 256  # waiting or under way
_TRIES = 8  # of one write
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
_RETRIES_PER_READ = 0.1
_MOST_SAVED_RETRIES = 10.0
_CREATE_TIMEOUT_S = 60.0
_POLL_S = 0.25

_FIELD = "field:"
_NAMES = {"#key": "key", "#row": "row", "#expires": "expires"}  # key and row are words of the expression language
_NEWEST_NAMES = {"#key": "key", "#schema": "schema", "#event_us": "event_us", "#expires": "expires"}
# As in Valkey: a row of another schema can no longer be read, and one that expired is no longer there.
_NEWEST = "attribute_not_exists(#key) OR #schema <> :schema OR #event_us <= :event_us OR #expires <= :now"
_ITEM_OVERHEAD_BYTES = len("key" "row" "schema" "event_us" "expires") + EVENT_AT + 2 * 21  # fmt: skip

_event_us = struct.Struct("<q").unpack_from


class DynamoTable:
    """A Table in DynamoDB. Belongs to one event loop."""

    def __init__(self, calls: Calls) -> None:
        """calls: see `open`, which makes them."""
        self._call, self._place = calls, calls.place
        self._table = calls.place.table
        self._reads = asyncio.Semaphore(_READS_AT_ONCE)
        self._writes = asyncio.Semaphore(_WRITES_AT_ONCE)
        self._fetches = 0
        self._retries = _MOST_SAVED_RETRIES

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[DynamoTable]:
        """The table that `url` names: see Place.parse.

        Nothing is asked of the server unless the URL says create=true: then the table is there, billed by request
        and with its TTL attribute set, before this returns.
        Raises ValueError for a URL that cannot be right or a table with other keys, and Unavailable.
        """
        place = Place.parse(url)
        async with connected(place, _READS_AT_ONCE + _WRITES_AT_ONCE) as calls:
            if place.create:
                await _create(calls)
            yield cls(calls)

    async def ping(self, timeout_s: float) -> None:
        """Reads an item that is not there: what a reader may do, not what an administrator may."""
        async with self._within(timeout_s):
            await self._call("get_item", TableName=self._table, Key=_key("tf:ping"))

    async def fetch(self, keys: Sequence[str], timeout_s: float) -> list[bytes | None]:
        """The value of each key, None where there is none: a call per hundred different keys, at the same time.

        Raises Refused where the table is throttled, also in part once the budget of second tries is spent, or where
        too many fetches wait.
        """
        if self._fetches >= _MAX_FETCHES:
            raise Refused(Reason.QUEUE_FULL, f"{self._fetches} reads wait for {self._place}")
        # one key that cannot exist would have the server refuse all
        wanted = [key for key in dict.fromkeys(keys) if 0 < len(key.encode()) <= MAX_KEY_BYTES]
        found: dict[str, bytes] = {}
        self._fetches += 1
        try:
            async with self._within(timeout_s):
                await _each(_parts(wanted, _KEYS_PER_READ), lambda part: self._fetch_part(part, found), _READS_AT_ONCE)
        finally:
            self._fetches -= 1
        return [found.get(key) for key in keys]

    async def keep_newest(
        self, keys: Sequence[str], rows: Sequence[bytes], expiries_ms: Sequence[int], timeout_s: float
    ) -> int:
        """See Table. One conditional put per row, a few at the same time; rows of one key in the order given.

        Rows leave up to a second later than asked, as DynamoDB counts seconds.
        Raises ValueError before anything is written. After another error some rows may have been stored; writing the
        same rows again is harmless.
        """
        items = [_item(key, row, expiry_ms) for key, row, expiry_ms in zip(keys, rows, expiries_ms, strict=True)]
        by_key: dict[str, list[Item]] = {}
        for key, item in zip(keys, items, strict=True):
            by_key.setdefault(key, []).append(item)
        kept = 0

        async def put(items_of_key: Sequence[Item]) -> None:
            nonlocal kept
            for item in items_of_key:
                stored = await self._put_if_newest(item)
                kept += stored  # not in one line: others count while this one waits

        async with self._within(timeout_s):
            await _each(by_key.values(), put, _WRITES_AT_ONCE)
        return kept

    async def load(self, keys: Sequence[str], rows: Sequence[bytes], timeout_s: float) -> None:
        """See Table. 25 rows a call, a few calls at the same time; the last of a key's rows stays."""
        items = {key: _item(key, row, 0) for key, row in zip(keys, rows, strict=True)}
        puts = [{"PutRequest": {"Item": item}} for item in items.values()]
        async with self._within(timeout_s):
            await _each(_parts(puts, _ITEMS_PER_WRITE), self._write_part, _WRITES_AT_ONCE)

    async def drop(self, prefix: str, timeout_s: float) -> int:
        """See Table. Maps whose name starts so go too.

        A partition key has no order, so DynamoDB must read the whole table to find the keys: at 8 KB of everything
        stored, of whatever prefix, per read unit, and one write unit per KB removed. Where many generations share a
        large table that is the dearest call here. A thousand items are read at a time; when the deadline passes, what
        was removed stays removed, and another call begins at the front.
        """
        if not prefix:
            raise ValueError("prefix must not be empty: that would remove everything")
        dropped = 0
        start: dict[str, Any] = {}
        async with self._within(timeout_s):
            while True:
                page = await self._scan(prefix, start)
                deletes = [{"DeleteRequest": {"Key": {"key": item["key"]}}} for item in page["Items"]]
                await _each(_parts(deletes, _ITEMS_PER_WRITE), self._write_part, _WRITES_AT_ONCE)
                dropped += len(deletes)
                if not (last := page.get("LastEvaluatedKey")):
                    return dropped
                start = {"ExclusiveStartKey": last}

    async def keys(self, prefix: str, timeout_s: float) -> AsyncIterator[list[str]]:
        """See Table; read until its end, it costs what `drop` costs."""
        start: dict[str, Any] = {}
        while True:
            async with self._within(timeout_s):
                page = await self._scan(prefix, start)
            yield [item["key"]["S"] for item in page["Items"]]
            if not (last := page.get("LastEvaluatedKey")):
                return
            start = {"ExclusiveStartKey": last}

    async def read_map(self, name: str, timeout_s: float) -> dict[str, bytes]:
        async with self._within(timeout_s):
            reply = await self._call("get_item", TableName=self._table, Key=_key(name), ConsistentRead=True)
        return {
            attribute.removeprefix(_FIELD): value["B"]
            for attribute, value in reply.get("Item", {}).items()
            if attribute.startswith(_FIELD)
        }

    async def write_map(self, name: str, fields: Mapping[str, bytes], timeout_s: float) -> None:
        """See Table. Fields are attributes of their own, as only those can be set in one step in an item that may
        not be there yet.

        Raises ValueError, and changes nothing, for more fields than one update can set, or where the map would be
        larger than an item may be.
        """
        await self.swap_map(name, {}, fields, timeout_s)

    async def swap_map(
        self, name: str, before: Mapping[str, bytes | None], fields: Mapping[str, bytes], timeout_s: float
    ) -> bool:
        """See Table. One conditional update.

        Raises ValueError, and changes nothing, as `write_map` does, and where `before` is longer than one condition
        holds. With two fields a view, some sixty views can be published in one step.
        """
        _check_fields(name, before, fields)
        if not fields:
            found = await self.read_map(name, timeout_s) if before else {}
            return all(found.get(field) == value for field, value in before.items())
        parameters = {"TableName": self._table, "Key": _key(name), **update(before, fields)}
        try:
            async with self._within(timeout_s):
                await self._patiently(lambda: self._call("update_item", **parameters))
        except ConditionFailed:
            return False
        return True

    async def _fetch_part(self, keys: Sequence[str], found: dict[str, bytes]) -> None:
        wanted = [_key(key) for key in keys]
        for pause_s in _pauses_s():
            request = {
                "Keys": wanted,
                "ProjectionExpression": "#key,#row,#expires",
                "ExpressionAttributeNames": _NAMES,
                "ConsistentRead": self._place.consistent,
            }
            async with self._reads:
                reply = await self._call("batch_get_item", RequestItems={self._table: request})
            now_s = time.time()
            for item in reply["Responses"].get(self._table, ()):
                if "row" in item and not ("expires" in item and int(item["expires"]["N"]) <= now_s):
                    found[item["key"]["S"]] = item["row"]["B"]
            self._retries = min(_MOST_SAVED_RETRIES, self._retries + _RETRIES_PER_READ)
            # the service's own limit of 16 MB a reply leaves keys over too
            wanted = reply.get("UnprocessedKeys", {}).get(self._table, {}).get("Keys", ())
            if not wanted:
                return
            if self._retries < 1:
                raise self._throttled(f"left {len(wanted)} of {len(keys)} keys unread", pause_s)
            self._retries -= 1
            await asyncio.sleep(pause_s)

    async def _put_if_newest(self, item: Item) -> bool:
        values = {":schema": item["schema"], ":event_us": item["event_us"], ":now": {"N": str(int(time.time()))}}
        with contextlib.suppress(ConditionFailed):
            await self._patiently(
                lambda: self._call(
                    "put_item",
                    TableName=self._table,
                    Item=item,
                    ConditionExpression=_NEWEST,
                    ExpressionAttributeNames=_NEWEST_NAMES,
                    ExpressionAttributeValues=values,
                )
            )
            return True
        return False

    async def _write_part(self, requests: Sequence[Item]) -> None:
        """Puts or deletes, again for those that the server left undone."""
        left = requests

        async def write() -> bool | None:
            nonlocal left
            reply = await self._call("batch_write_item", RequestItems={self._table: left})
            left = reply.get("UnprocessedItems", {}).get(self._table, ())
            return None if left else True

        await self._patiently(write)

    async def _patiently(self, write: Callable[[], Awaitable[T | None]]) -> T:
        """The answer of a write. One that is refused, or answers None, is tried again after a pause."""
        for pause_s in (0.0, *itertools.islice(_pauses_s(), _TRIES - 1)):
            await asyncio.sleep(pause_s)
            with contextlib.suppress(Refused):
                async with self._writes:
                    answer = await write()
                if answer is not None:
                    return answer
        raise self._throttled(f"left a write undone {_TRIES} times", _LONGEST_PAUSE_S)

    async def _scan(self, prefix: str, start: Mapping[str, Any]) -> dict[str, Any]:
        return await self._patiently(
            lambda: self._call(
                "scan",
                TableName=self._table,
                FilterExpression="begins_with(#key, :prefix)",
                ProjectionExpression="#key",
                ExpressionAttributeNames={"#key": "key"},
                ExpressionAttributeValues={":prefix": {"S": prefix}},
                ConsistentRead=True,  # a value that was written just now must go too
                Limit=_KEYS_PER_SCAN,
                **start,
            )
        )

    def _throttled(self, what: str, retry_after_s: float) -> Refused:
        return Refused(Reason.OVERLOADED, f"{self._place} is throttled: it {what}", retry_after_s)

    @contextlib.asynccontextmanager
    async def _within(self, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"{self._place} did not answer within {timeout_s * 1e3:.0f} ms") from None


def _key(key: str) -> Item:
    return {"key": {"S": key}}


def _item(key: str, row: bytes, expiry_ms: int) -> Item:
    """Raises ValueError for what a table cannot hold or compare."""
    key_bytes = len(key.encode())
    if not 0 < key_bytes <= MAX_KEY_BYTES:
        raise ValueError(f"a key must have 1 to {MAX_KEY_BYTES} bytes, got {key_bytes}: {key[:64]!r}")
    if len(row) < HEAD_BYTES:
        raise ValueError(f"a row must have at least {HEAD_BYTES} bytes, got {len(row)} for {key!r}")
    _check_size(key, key_bytes + len(row) + _ITEM_OVERHEAD_BYTES)
    item: Item = {
        "key": {"S": key},
        "row": {"B": row},
        "schema": {"B": row[:EVENT_AT]},
        "event_us": {"N": str(_event_us(row, EVENT_AT)[0])},
    }
    if expiry_ms:
        item["expires"] = {"N": str(-(-expiry_ms // 1000))}
    return item


def _check_fields(name: str, before: Collection[str], fields: Mapping[str, bytes]) -> None:
    for what, given, most in (("sets", fields, MAX_FIELDS), ("compares", before, MAX_COMPARED)):
        if len(given) > most:
            raise ValueError(f"one update of a map {what} up to {most} fields, got {len(given)} of {name!r}")
    size = sum(len(f"{_FIELD}{field}".encode()) + len(value) for field, value in fields.items())
    _check_size(name, size + len(f"key{name}".encode()))


def update(before: Mapping[str, bytes | None], fields: Mapping[str, bytes]) -> dict[str, Any]:
    """The parameters with which update_item sets one field or more if each of `before` is as it says."""
    names = {f"#{i}": f"{_FIELD}{field}" for i, field in enumerate([*fields, *before])}
    values = {
        f":{i}": {"B": value} for i, value in enumerate([*fields.values(), *before.values()]) if value is not None
    }
    parameters: dict[str, Any] = {
        "UpdateExpression": "SET " + ",".join(f"#{i}=:{i}" for i in range(len(fields))),
        "ExpressionAttributeNames": names,
        "ExpressionAttributeValues": values,
    }
    if before:
        parameters["ConditionExpression"] = " AND ".join(
            f"attribute_not_exists(#{i})" if value is None else f"#{i}=:{i}"
            for i, value in enumerate(before.values(), len(fields))
        )
    return parameters


def _check_size(key: str, size: int) -> None:
    if size > MAX_ITEM_BYTES:
        raise ValueError(f"an item of DynamoDB must have at most {MAX_ITEM_BYTES} bytes, got {size} for {key[:64]!r}")


def _parts(things: Sequence[T], size: int) -> list[Sequence[T]]:
    return [things[start : start + size] for start in range(0, len(things), size)]


def _pauses_s() -> Iterable[float]:
    """Each about twice as long as the one before, and spread so that callers do not come back in step."""
    for n in itertools.count():
        yield min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(n, 16)) * random.uniform(0.5, 1.0)


async def _each(things: Collection[T], do: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """Does each, `at_once` at a time. The first error ends the others and is raised as it is."""
    queue = iter(things)

    async def work() -> None:
        for thing in queue:
            await do(thing)

    if len(things) == 1:
        return await work()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(things))):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _create(calls: Calls) -> None:
    place = calls.place
    try:
        async with asyncio.timeout(_CREATE_TIMEOUT_S):
            with contextlib.suppress(TableExists):
                await calls(
                    "create_table",
                    TableName=place.table,
                    AttributeDefinitions=[{"AttributeName": "key", "AttributeType": "S"}],
                    KeySchema=[{"AttributeName": "key", "KeyType": "HASH"}],
                    BillingMode="PAY_PER_REQUEST",
                )
                log.info("table created", extra={"store": str(place)})
            await _until_active(calls)
            ttl = await calls("describe_time_to_live", TableName=place.table)
            if ttl["TimeToLiveDescription"]["TimeToLiveStatus"] == "DISABLED":
                await calls(
                    "update_time_to_live",
                    TableName=place.table,
                    TimeToLiveSpecification={"Enabled": True, "AttributeName": "expires"},
                )
    except TimeoutError:
        raise Unavailable(f"{place} was not ready within {_CREATE_TIMEOUT_S:.0f} s") from None


async def _until_active(calls: Calls) -> None:
    while True:
        table = (await calls("describe_table", TableName=calls.place.table))["Table"]
        keys = [(key["AttributeName"], key["KeyType"]) for key in table["KeySchema"]]
        types = {a["AttributeName"]: a["AttributeType"] for a in table["AttributeDefinitions"]}
        if keys != [("key", "HASH")] or types["key"] != "S":
            raise ValueError(f"{calls.place} must have the partition key 'key' of type S alone, got {keys}")
        if table["TableStatus"] == "ACTIVE":
            return
        await asyncio.sleep(_POLL_S)
