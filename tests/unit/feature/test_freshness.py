"""Watermarks as readers see them."""

from __future__ import annotations

from collections.abc import Awaitable

import pytest

from services.feature.define.definition import Aggregate, Source, View, windowed
from services.feature.online.valkey import Reply, Word
from services.feature.stream.freshness import Watermarks
from services.feature.stream.states import StateStore
from services.resilience.errors import Unavailable


def source(name: str) -> Source:
    return Source(name, f"{name}/*.parquet", "at_us", "known_us", "number", ("who",))


A, B = source("a"), source("b")
BOTH = View(
    "both", "who", (*windowed(A, "", (Aggregate.COUNT,), ("1h",)), *windowed(B, "", (Aggregate.COUNT,), ("1h",)))
)
ONE = View("one", "who", windowed(A, "", (Aggregate.COUNT,), ("1h",)))


class Told:
    """A store that holds these watermarks; None while it is away."""

    def __init__(self, watermarks: dict[str, int] | None) -> None:
        self.watermarks = watermarks

    def call(self, *command: Word, timeout_s: float) -> Awaitable[Reply]:
        return self._call(str(command[1]).rpartition(":")[2])

    async def _call(self, name: str) -> Reply:
        if self.watermarks is None:
            raise Unavailable("away")
        return [b"watermark", str(self.watermarks[name]).encode(), b"view:1", b"5"] if name in self.watermarks else []


async def test_a_view_is_as_complete_as_the_least_complete_of_its_sources() -> None:
    store = Told({"a": 90, "b": 70})
    watermarks = Watermarks(StateStore(store, "test"), ["a", "b"])
    assert (watermarks.of(ONE), watermarks.of(BOTH)) == (0, 0)
    await watermarks.refresh()
    assert (watermarks.of(ONE), watermarks.of(BOTH)) == (90, 70)
    store.watermarks = {"a": 95}
    await watermarks.refresh()
    assert (watermarks.of(ONE), watermarks.of(BOTH)) == (95, 0)


async def test_what_is_known_stays_while_the_store_is_away() -> None:
    store = Told({"a": 90})
    watermarks = Watermarks(StateStore(store, "test"), ["a"])
    await watermarks.refresh()
    store.watermarks = None
    with pytest.raises(Unavailable):
        await watermarks.refresh()
    assert watermarks.of(ONE) == 90
