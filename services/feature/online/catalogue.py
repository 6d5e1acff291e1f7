"""What of a mesh's views can be read, and which generations of them there are: one map in the table.

view name -> JSON of PublishedView; #<view> -> JSON of its generations; #next -> the number of the next generation.

Every change is decided on what was read and made only if that still holds, so that of writers at once one goes first
and the others decide again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from services.feature.define.schema import ViewSchema
from services.feature.online import generations
from services.feature.online.generations import Generation
from services.feature.online.table import Table
from services.resilience.errors import BadInput, NotFound, Unavailable, Violation

log = logging.getLogger(__name__)

T = TypeVar("T")
Fields = Mapping[str, bytes]

TIMEOUT_S = 10.0
_MOST_TRIES = 64  # of many writers at once, one succeeds each time
_LONGEST_PAUSE_S = 0.02
_NEXT = "#next"


class PublishedView(msgspec.Struct, frozen=True):
    """One view as the catalogue holds it.

    schema_hash: 16 hexadecimal digits, as JSON readers elsewhere round large numbers.
    watermark_us: microseconds since 1970 UTC up to which the newest materialisation counted events.
    rows: how many it wrote. generation: where its rows are; 0 where they are written one by one.
    defaults: see ViewSchema.
    kind: "row" where values are rows of features, "state" where they are tiles that a reader finishes.
    definition: what they were computed from: see ViewSchema.meaning.
    """

    name: str
    entity: str
    columns: list[str]
    ttl_s: float
    schema_hash: str
    watermark_us: int
    rows: int
    generation: int = 0
    kind: str = "row"
    defaults: tuple[float | None, ...] = ()
    definition: str = ""

    def schema(self) -> ViewSchema:
        """Raises ValueError where what is recorded contradicts itself."""
        schema = ViewSchema(self.name, self.entity, tuple(self.columns), self.ttl_s, self.defaults, self.definition)
        if f"{schema.schema_hash:016x}" != self.schema_hash:
            raise ValueError(f"schema_hash must be {schema.schema_hash:016x}, got {self.schema_hash}")
        if self.generation < 0:
            raise ValueError(f"generation must be at least 0, got {self.generation}")
        return schema


class Published(NamedTuple):
    """What a publication did.

    replaced: view -> the generation that was published before; to be retired.
    overtaken: view -> our generation, where one with a later watermark was published meanwhile.
    """

    replaced: Mapping[str, int]
    overtaken: Mapping[str, int]


class Pointer(msgspec.Struct, frozen=True):
    """What decides where a published view is read and written."""

    schema_hash: str
    watermark_us: int
    generation: int = 0
    kind: str = "row"

    def check(self, schema: ViewSchema) -> None:
        """Raises BadInput where rows of the schema would stand among states, or among rows of another.

        Rows of generation 0 may change their schema one by one, as they always could.
        """
        if self.kind != "row":
            told = f"must be a view of rows, but {schema.name!r} is maintained by stream, and its states are not ours"
            raise BadInput(Violation("kind", f"{told} to write; load and publish a generation of rows"))
        if self.generation and self.schema_hash != f"{schema.schema_hash:016x}":
            told = (
                f"must be {self.schema_hash}, with which generation {self.generation} of view {schema.name!r} is "
                f"published, got {schema.schema_hash:016x}; load and publish a generation of it"
            )
            raise BadInput(Violation("schema_hash", told))


_pointers = msgspec.json.Decoder(Pointer)


class Catalogue:
    """The map of one mesh."""

    def __init__(self, table: Table, name: str, now_us: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        self._table, self._name, self._now_us = table, name, now_us
        self._unreadable: set[tuple[str, bytes]] = set()

    async def views(self, timeout_s: float) -> list[PublishedView]:
        """Every published view, by name. One that cannot be read is left out and logged once."""
        found: list[PublishedView] = []
        for name, text in (await self._table.read_map(self._name, timeout_s)).items():
            if name.startswith("#"):
                continue
            try:
                view = msgspec.json.decode(text, type=PublishedView)
                view.schema()
            except ValueError as error:
                self._tell_once(name, text, error)
            else:
                found.append(view)
        return sorted(found, key=lambda view: view.name)

    async def pointer(self, view: str) -> Pointer | None:
        """None where the view is not published. Raises Unavailable where what is published cannot be read."""
        text = (await self._table.read_map(self._name, TIMEOUT_S)).get(view)
        try:
            return _pointers.decode(text) if text else None
        except ValueError as error:
            raise Unavailable(f"what is published of view {view!r} cannot be read: {error}") from None

    async def listed(self, view: str) -> tuple[list[Generation], int]:
        """The generations of a view, and which is published; 0 for none."""
        fields = await self._table.read_map(self._name, TIMEOUT_S)
        return self._listed(fields, view), self._generation(fields, view)

    async def next_number(self) -> int:
        """What `begin` would answer now, unless the number is in use."""
        return max(1, _next(await self._table.read_map(self._name, TIMEOUT_S)))

    async def begin(self, view: str) -> int:
        """The number of a new generation, which no other view and nobody else has."""

        def decide(fields: Fields) -> tuple[dict[str, bytes], int]:
            listed, published = self._listed(fields, view), self._generation(fields, view)
            # a counter that was lost must not hand out what is in use
            number = max(1, _next(fields), published + 1, *(one.number + 1 for one in listed))
            after = generations.begun(listed, number, published, self._now_us())
            return {_NEXT: str(number + 1).encode(), f"#{view}": msgspec.json.encode(after)}, number

        return await self._change((_NEXT, view, f"#{view}"), decide)

    async def publish(self, views: Sequence[PublishedView], loaded: Collection[str], even_if_older: bool) -> Published:
        """See OnlineStore.publish. loaded: views that came with a generation; others stay where they are."""

        def decide(fields: Fields) -> tuple[dict[str, bytes], Published]:
            after: dict[str, bytes] = {}
            done: Published = Published(replaced := {}, overtaken := {})
            for view in views:
                listed, before = self._listed(fields, view.name), self._pointer(fields, view.name)
                at = before.generation if before else 0
                if view.name not in loaded:
                    after[view.name] = msgspec.json.encode(_stays(view, before))
                elif before and at != view.generation and _stands(before, view, even_if_older):
                    overtaken[view.name] = view.generation
                    after[f"#{view.name}"] = msgspec.json.encode(generations.given_up(listed, view.generation))
                else:
                    if at != view.generation:
                        _check_there(listed, view)
                        replaced[view.name] = at
                    flipped = generations.flipped(listed, view.generation, at, self._now_us())
                    after[view.name] = msgspec.json.encode(view)
                    after[f"#{view.name}"] = msgspec.json.encode(flipped)
            return after, done

        names = [view.name for view in views]
        return await self._change((*names, *(f"#{name}" for name in names)), decide)

    async def give_up(self, view: str, number: int) -> None:
        """From now on a generation cannot be published. Raises ValueError where it is."""

        def decide(fields: Fields) -> tuple[dict[str, bytes], None]:
            if (pointer := self._pointer(fields, view)) and number == pointer.generation:
                raise ValueError(f"generation {number} of view {view!r} is published and cannot be removed")
            return {f"#{view}": msgspec.json.encode(generations.given_up(self._listed(fields, view), number))}, None

        await self._change((view, f"#{view}"), decide)

    async def forget(self, view: str, number: int) -> None:
        """A generation has no rows any more."""

        def decide(fields: Fields) -> tuple[dict[str, bytes], None]:
            left = [one for one in self._listed(fields, view) if one.number != number]
            return {f"#{view}": msgspec.json.encode(left)}, None

        await self._change((f"#{view}",), decide)

    async def _change(self, names: Collection[str], decide: Callable[[Fields], tuple[dict[str, bytes], T]]) -> T:
        """names: of the fields that the decision rests on."""
        for _ in range(_MOST_TRIES):
            fields = await self._table.read_map(self._name, TIMEOUT_S)
            after, result = decide(fields)
            before = {name: fields.get(name) for name in names}
            if await self._table.swap_map(self._name, before, after, TIMEOUT_S):
                return result
            await asyncio.sleep(random.uniform(0, _LONGEST_PAUSE_S))
        raise Unavailable(f"others changed {self._name} each of {_MOST_TRIES} times that we tried to")

    def _pointer(self, fields: Fields, view: str) -> Pointer | None:
        """What is damaged counts as nothing, so that publishing mends it."""
        text = fields.get(view)
        try:
            return _pointers.decode(text) if text else None
        except ValueError as error:
            self._tell_once(view, text or b"", error)
            return None

    def _generation(self, fields: Fields, view: str) -> int:
        pointer = self._pointer(fields, view)
        return pointer.generation if pointer else 0

    def _listed(self, fields: Fields, view: str) -> list[Generation]:
        """What is damaged counts as nothing: its rows may stay for ever, but the view can be published."""
        text = fields.get(f"#{view}")
        try:
            return generations.read(text)
        except ValueError as error:
            self._tell_once(f"#{view}", text or b"", error)
            return []

    def _tell_once(self, name: str, text: bytes, error: ValueError) -> None:
        if (name, text) not in self._unreadable:
            self._unreadable.add((name, text))
            log.warning("published view unreadable", extra={"view": name, "reason": str(error)})


def _next(fields: Fields) -> int:
    text = fields.get(_NEXT, b"")
    return int(text) if text.isdigit() else 0


def _stands(published: Pointer, view: PublishedView, even_if_older: bool) -> bool:
    """Whether what is published stays: it counted later events or, of equals, was begun later.

    Of states, whether it was begun later: what was built before it is no longer kept up to date by anyone.
    """
    if published.kind == view.kind == "state":
        return published.generation > view.generation
    return not even_if_older and (published.watermark_us, published.generation) > (view.watermark_us, view.generation)


def _stays(view: PublishedView, published: Pointer | None) -> PublishedView:
    """The view where its rows are. Raises BadInput where they are of another schema."""
    if published is None:
        return view
    published.check(view.schema())
    return msgspec.structs.replace(view, generation=published.generation)


def _check_there(listed: Sequence[Generation], view: PublishedView) -> None:
    if not generations.open_for_publishing(listed, view.generation):
        raise NotFound(
            f"generation {view.generation} of view {view.name!r} is not there: it was never begun, or was removed "
            "because it was not published for too long"
        )
