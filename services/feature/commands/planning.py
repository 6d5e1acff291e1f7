"""What a materialisation would do: what is defined, against what is published. It writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from services.feature.commands.sampling import SampledRows
from services.feature.define.definition import View
from services.feature.online.catalogue import PublishedView
from services.feature.online.packed import RowLayout

_IDS_MEASURED = 10_000


class Change(StrEnum):
    """How a view that is defined differs from the one that is published."""

    NEW = "new"
    CHANGED = "meaning changed"
    UNRECORDED = "meaning not recorded"
    UNCHANGED = "unchanged"
    UNDEFINED = "no longer defined"


@dataclass(frozen=True, slots=True)
class PlannedView:
    """generation, next_generation: 0 for none; next ones are given in the order of materialising.

    added, removed: columns. rows: that were published. entities: that would be now, None where it is not asked.
    bytes: of their keys and values, without what the store needs around them; None where it cannot be known yet.
    watermark_us: microseconds since 1970 UTC up to which what is published counted events; 0 for none.
    age_s: how long ago that was, NaN for never.
    """

    view: str
    entity: str
    change: Change
    kind: str
    generation: int
    next_generation: int
    added: Sequence[str]
    removed: Sequence[str]
    rows: int
    entities: int | None
    bytes: int | None
    watermark_us: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Expected:
    """What the offline store has of a view. id_bytes: of an entity's id, on average."""

    entities: int
    id_bytes: float

    @classmethod
    def of(cls, entity_ids: Sequence[str]) -> Expected:
        step = max(1, len(entity_ids) // _IDS_MEASURED)
        some = entity_ids[::step]
        return cls(len(entity_ids), sum(len(one.encode()) for one in some) / max(1, len(some)))


def change_of(view: View, published: PublishedView | None) -> Change:
    if published is None:
        return Change.NEW
    if published.schema_hash != f"{view.schema().schema_hash:016x}":
        return Change.CHANGED
    if not published.definition:
        return Change.UNRECORDED
    return Change.UNCHANGED if published.definition == view.fingerprint() else Change.CHANGED


def planned(
    views: Sequence[View],
    defined: Sequence[str],
    published: Sequence[PublishedView],
    expected: Mapping[str, Expected],
    samples: Mapping[str, SampledRows],
    next_generation: int,
    key_prefix: Callable[[str, int], str],
    now_us: int,
) -> list[PlannedView]:
    """The views in order, then those that are published but no longer defined.

    defined: every name that definitions have, also of views that are not asked about. expected, samples: by view.
    key_prefix: of the rows of a view's generation; its keys end with the entity's id and a brace.
    """
    there = {view.name: view for view in published}
    found = []
    for number, view in enumerate(views, start=next_generation):
        now, then = there.get(view.name), expected.get(view.name)
        before = list(now.columns) if now else []
        found.append(
            PlannedView(
                view=view.name,
                entity=view.entity,
                change=change_of(view, now),
                kind="state" if view.stream else "row",
                generation=now.generation if now else 0,
                next_generation=number,
                added=[column for column in view.columns if column not in before],
                removed=[column for column in before if column not in view.columns],
                rows=now.rows if now else 0,
                entities=then.entities if then else None,
                bytes=_bytes(view, key_prefix(view.name, number), then, samples.get(view.name)) if then else None,
                watermark_us=now.watermark_us if now else 0,
                age_s=(now_us - now.watermark_us) * 1e-6 if now else float("nan"),
            )
        )
    return [*found, *(_undefined(there[name], now_us) for name in sorted(there) if name not in defined)]


def row_bytes(view: View) -> int:
    """Of one packed row."""
    (row,) = RowLayout(view.schema()).pack(1, np.zeros((1, len(view.columns)), np.float32))
    return len(row)


def _bytes(view: View, key_prefix: str, expected: Expected, sample: SampledRows | None) -> int | None:
    if view.stream:  # how large a state is, only its events tell
        if sample is None or not sample.rows:
            return None
        return round(expected.entities * sample.bytes / len(sample.rows))
    each = row_bytes(view) + len(key_prefix) + expected.id_bytes + len("}")
    return round(expected.entities * each)


def _undefined(view: PublishedView, now_us: int) -> PlannedView:
    return PlannedView(
        view=view.name,
        entity=view.entity,
        change=Change.UNDEFINED,
        kind=view.kind,
        generation=view.generation,
        next_generation=0,
        added=[],
        removed=list(view.columns),
        rows=view.rows,
        entities=None,
        bytes=None,
        watermark_us=view.watermark_us,
        age_s=(now_us - view.watermark_us) * 1e-6,
    )
