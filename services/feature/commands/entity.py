"""What an online store has of one entity, and what a reader would get of it now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.feature.commands.stored import STATUS, UnreadableStates, opened
from services.feature.define.definition import View
from services.feature.online.catalogue import PublishedView
from services.feature.online.store import OnlineStore


@dataclass(frozen=True, slots=True)
class Cell:
    """value: as it is stored, where EXPIRED too, although readers then get the default; None where there is none.

    status: OK, NULL, MISSING or EXPIRED.
    """

    column: str
    value: float | None
    status: str


@dataclass(frozen=True, slots=True)
class EntityRow:
    """An entity's row of one view.

    found: whether there is one that can be read. event_us: the newest event counted, or the watermark the row was
    written with; 0 where there is none. age_s: since then, NaN for never. watermark_us: of the view's materialisation.
    note: why there are no cells.
    """

    view: str
    entity: str
    kind: str
    generation: int
    watermark_us: int
    ttl_s: float
    found: bool
    event_us: int
    age_s: float
    cells: Sequence[Cell]
    note: str = ""


async def rows_of(
    store: OnlineStore,
    published: Sequence[PublishedView],
    defined: Sequence[View],
    entity_id: str,
    now_us: int,
    complete_us: Mapping[str, int],
    timeout_s: float = 5.0,
) -> list[EntityRow]:
    """One per view, in order. complete_us: see `services.feature.commands.stored.opened`; by view."""
    by_name = {view.name: view for view in defined}
    keys = [f"{store.key_prefix(view.name, view.generation)}{entity_id}}}" for view in published]
    stored = await store.fetch(keys, timeout_s)
    return [
        _row(view, by_name.get(view.name), value, now_us, complete_us.get(view.name, 0))
        for view, value in zip(published, stored, strict=True)
    ]


def _row(
    published: PublishedView, defined: View | None, value: bytes | None, now_us: int, complete_us: int
) -> EntityRow:
    cells: list[Cell] = []
    note, event_us = "", 0
    try:
        found = opened(published, defined, [value], now_us, complete_us)
    except UnreadableStates as error:
        note = str(error)
    else:
        event_us = int(found.event_us[0])
        statuses = [STATUS[int(status)] for status in found.status[0]]
        numbers = [float(number) for number in found.values[0]]
        cells = [
            Cell(name, None if status in ("NULL", "MISSING") and number != number else number, status)
            for name, number, status in zip(published.columns, numbers, statuses, strict=True)
        ]
        if value is not None and not event_us:
            note = "what is stored is damaged or of another schema"
    return EntityRow(
        view=published.name,
        entity=published.entity,
        kind=published.kind,
        generation=published.generation,
        watermark_us=published.watermark_us,
        ttl_s=published.ttl_s,
        found=event_us > 0,
        event_us=event_us,
        age_s=(now_us - event_us) * 1e-6 if event_us else float("nan"),
        cells=cells,
        note=note,
    )
