"""Some of the rows that an online store holds, as good as drawn at random.

Valkey lists its keys in the order of a hash that it seeds anew in every process, and DynamoDB in that of a hash of the
key: the first that come are a fair sample, and nothing has to be read to the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from services.feature.online.catalogue import PublishedView
from services.feature.online.store import OnlineStore

ROWS = 1_000
"""Of each view, unless somebody asks for more."""
MOST_SEEN = 1_000_000
"""Keys that are looked at for all views together: a few seconds. Of a view with few rows among very many, some may be
missed."""
_FETCHED_AT_ONCE = 256


class SampledRows(NamedTuple):
    """rows: as they are stored. key_bytes: of their keys, together."""

    entity_ids: Sequence[str]
    rows: Sequence[bytes]
    key_bytes: int

    @property
    def bytes(self) -> int:
        """Of keys and values, without what the store needs around them."""
        return self.key_bytes + sum(map(len, self.rows))


async def sampled(
    store: OnlineStore, views: Sequence[PublishedView], rows: int = ROWS, timeout_s: float = 60.0
) -> Mapping[str, SampledRows]:
    """Up to `rows` rows of each view. A row that leaves the store meanwhile is left out."""
    prefixes = {view.name: store.key_prefix(view.name, view.generation) for view in views}
    keys: dict[str, dict[str, None]] = {prefix: {} for prefix in prefixes.values()}
    seen = 0
    async for some in store.keys(timeout_s):
        for key in some:
            of_view = keys.get(key[: key.find("{") + 1])
            if of_view is not None and len(of_view) < rows:
                of_view[key] = None  # one may come twice
        seen += len(some)
        if seen >= MOST_SEEN or all(len(of_view) >= rows for of_view in keys.values()):
            break
    found = {}
    for view in views:
        prefix = prefixes[view.name]
        mine = list(keys[prefix])
        stored: list[bytes | None] = []
        for start in range(0, len(mine), _FETCHED_AT_ONCE):
            stored += await store.fetch(mine[start : start + _FETCHED_AT_ONCE], timeout_s)
        there = [(key, row) for key, row in zip(mine, stored, strict=True) if row is not None]
        ids = [key[len(prefix) : -1] for key, _ in there]
        found[view.name] = SampledRows(ids, [row for _, row in there], sum(len(key.encode()) for key, _ in there))
    return found
