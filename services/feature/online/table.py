"""What an online store is made of: values by key, and a few named maps beside them.

Valkey, a Redis Cluster and DynamoDB each offer it; store.py knows rows and views, and knows only this.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence, Set
from typing import Protocol

from services.feature.online.packed import EVENT_AT, MAGIC
from services.resilience.errors import Unavailable

HEAD_BYTES = EVENT_AT + 8
"""Of a packed row: magic, layout version, schema hash and event time, which a table may compare and nothing else."""

__all__ = ["HEAD_BYTES", "MAGIC", "PartlyUnavailable", "Table"]


class PartlyUnavailable(Unavailable):
    """A part of a table could not be read, for example one node of a cluster.

    values: as `fetch` returns them; what stands where a key failed means nothing. failed: the keys that failed.
    """

    def __init__(self, detail: str, values: Sequence[bytes | None], failed: Set[str]) -> None:
        super().__init__(detail)
        self.values, self.failed = values, failed


class Table(Protocol):
    """Every method raises Unavailable, DeadlineExceeded or Refused, and leaves what it did not reach unchanged.

    A full store raises Refused; it still answers reads.
    """

    async def ping(self, timeout_s: float) -> None: ...

    async def fetch(self, keys: Sequence[str], timeout_s: float) -> list[bytes | None]:
        """The value of each key, None where there is none. Raises PartlyUnavailable where it has some of them only."""
        ...

    async def keep_newest(
        self, keys: Sequence[str], rows: Sequence[bytes], expiries_ms: Sequence[int], timeout_s: float
    ) -> int:
        """Stores each row unless the one there has the same schema and has counted later events; how many were stored.

        Decided where the data are, in one step per row, so that no two writers can lose each other's update.
        expiries_ms: when the row leaves the table, milliseconds since 1970; 0 for never.
        """
        ...

    async def load(self, keys: Sequence[str], rows: Sequence[bytes], timeout_s: float) -> None:
        """Stores every row, whatever was there: for a generation that nobody reads or writes yet."""
        ...

    async def drop(self, prefix: str, timeout_s: float) -> int:
        """Removes every value whose key starts with `prefix`, a little at a time; how many there were."""
        ...

    def keys(self, prefix: str, timeout_s: float) -> AsyncIterator[list[str]]:
        """The keys that start with `prefix`, some at a time, in an order that has nothing to do with them. One that is
        written or removed meanwhile may be there or not, and one may come twice.
        """
        ...

    async def read_map(self, name: str, timeout_s: float) -> dict[str, bytes]:
        """A named map, empty where there is none."""
        ...

    async def write_map(self, name: str, fields: Mapping[str, bytes], timeout_s: float) -> None:
        """Sets these fields of a named map, all or none; others stay."""
        ...

    async def swap_map(
        self, name: str, before: Mapping[str, bytes | None], fields: Mapping[str, bytes], timeout_s: float
    ) -> bool:
        """Sets these fields of a named map if every field of `before` still is what it says; whether they were set.

        Decided where the data are, all or none, so that of writers at once one goes first and the others see it.
        before: None for a field that is not there; no field is ever empty.
        """
        ...
