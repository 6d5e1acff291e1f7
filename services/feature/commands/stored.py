"""What stands in an online store, opened: rows of features and states of streams alike."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.feature.define.definition import View
from services.feature.online.catalogue import PublishedView
from services.feature.online.packed import EVENT_AT, RowLayout, Rows
from services.feature.registry import Layout

_event_us = struct.Struct("<q").unpack_from
STATUS = {1: "OK", 2: "NULL", 3: "MISSING", 4: "EXPIRED"}


class UnreadableStates(ValueError):
    """Tiles cannot be finished without the definition that they were made by."""


@dataclass(frozen=True, slots=True)
class Opened:
    """n values of the store, c columns.

    values: float32 (n, c), as if no row ever expired; the default or NaN where not OK. status: uint8 (n, c), of
    tenfold.feature.v1.Status, as of now. plain: likewise, as if no row ever expired. event_us: int64 (n,): up to where
    events were counted; 0 where there is no row that can be read.
    """

    values: NDArray[np.float32]
    status: NDArray[np.uint8]
    plain: NDArray[np.uint8]
    event_us: NDArray[np.int64]


def opened(
    published: PublishedView, defined: View | None, rows: Sequence[bytes | None], now_us: int, complete_us: int = 0
) -> Opened:
    """Rows as they were written, states as of now; what is damaged or of another schema is MISSING.

    defined: the view's definition, which states need. complete_us: up to where the sources of states are known to be
    complete, microseconds since 1970 UTC, 0 for unknown. Raises UnreadableStates.
    """
    if published.kind == "state":
        layout, lasting = _state_layouts(published, defined, complete_us)
        now, plain = _unpacked(layout, rows, now_us), _unpacked(lasting, rows, now_us)
    else:
        layout = RowLayout(published.schema())
        written = [_event_us(row, EVENT_AT)[0] if row and len(row) >= EVENT_AT + 8 else 0 for row in rows]
        # at the moment up to which it counted, no row has expired
        now, plain = _unpacked(layout, rows, now_us), _unpacked(layout, rows, written)
    shape = (len(rows), len(published.columns))
    return Opened(
        np.frombuffer(plain.values, "<f4").reshape(shape),
        np.frombuffer(now.status, np.uint8).reshape(shape),
        np.frombuffer(plain.status, np.uint8).reshape(shape),
        np.frombuffer(plain.event_us, "<i8"),
    )


def _unpacked(layout: Layout, rows: Sequence[bytes | None], as_of_us: int | Sequence[int]) -> Rows:
    return layout.unpack(rows, as_of_us, foreign_is_missing=True)


def _state_layouts(published: PublishedView, defined: View | None, complete_us: int) -> tuple[Layout, Layout]:
    """As readers have it, and as if no row ever expired."""
    from services.feature.stream.finish import StateLayout
    from services.feature.tiles.kernel import ViewKernel

    if defined is None or published.schema_hash != f"{defined.schema().schema_hash:016x}":
        why = "it is not defined any more" if defined is None else "its definition has other columns now"
        raise UnreadableStates(f"the states of view {published.name!r} cannot be finished: {why}")
    kernel = ViewKernel(defined)
    lasting = StateLayout(dataclasses.replace(defined, ttl_s=0.0), kernel, lambda: complete_us)
    return StateLayout(defined, kernel, lambda: complete_us), lasting
