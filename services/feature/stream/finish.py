"""Finishes the states of a stream view into rows, as of the moment asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from services.feature.define.definition import View
from services.feature.online.packed import EXPIRED, MISSING, NULL, OK, Rows, SchemaChanged
from services.feature.stream.log import MAX_US
from services.feature.tiles.kernel import ViewKernel
from services.feature.tiles.state import MAGIC, ForeignState, StateError

NEWEST_AT = len(MAGIC) + 8


_NEVER = bytes(8)


class StateLayout:
    """Reads states as `RowLayout` reads rows; see there for what `unpack` answers.

    A row has counted events up to the newest that its state counted or, where that is later, up to the watermark of
    the view's sources: an entity that nothing happens to does not age while its sources are known to be complete.
    """

    def __init__(self, view: View, kernel: ViewKernel, watermark_us: Callable[[], int] = lambda: 0) -> None:
        self.schema = view.schema()
        self._kernel, self._watermark_us = kernel, watermark_us
        c = len(self.schema.columns)
        self._ttl_us = self.schema.ttl_s * 1e6 if self.schema.ttl_s > 0 else math.inf
        defaults = self.schema.defaults or (None,) * c
        self._defaults = np.array([np.nan if default is None else default for default in defaults], "<f4")

    @property
    def answer_bytes(self) -> int:
        return 5 * len(self.schema.columns) + 12

    def unpack(
        self, rows: Sequence[bytes | None], as_of_us: int | Sequence[int], *, foreign_is_missing: bool = False
    ) -> Rows:
        moments = np.asarray(as_of_us, np.int64)
        latest = np.minimum(moments, MAX_US).tolist()  # nothing is known later
        states, foreign, unreadable = rows, 0, 0
        kernel = self._kernel
        unread = kernel.damaged + kernel.foreign
        computed = kernel.rows(states, latest)
        if kernel.damaged + kernel.foreign != unread:
            states, foreign, unreadable = self._readable(rows, foreign_is_missing)
        newest = b"".join([_NEVER if state is None else state[NEWEST_AT : NEWEST_AT + 8] for state in states])
        event_us = np.maximum(np.frombuffer(newest, "<i8"), self._watermark_us())
        age_us = moments - event_us
        status = np.where(computed.null, NULL, OK).astype(np.uint8)
        status[age_us >= self._ttl_us] = EXPIRED
        status[~computed.known] = MISSING
        with np.errstate(over="ignore"):
            values = np.where(status == OK, computed.values, self._defaults).astype("<f4")
        told_us = np.where(computed.known, event_us, 0).astype("<i8")
        age_s = np.where(computed.known, age_us * 1e-6, np.nan).astype("<f4")
        return Rows(values.tobytes(), status.tobytes(), told_us.tobytes(), age_s.tobytes(), foreign, unreadable)

    def _readable(self, rows: Sequence[bytes | None], foreign_is_missing: bool) -> tuple[list[bytes | None], int, int]:
        """None for what cannot be read, and how many were foreign and damaged. Raises SchemaChanged."""
        states, foreign, unreadable = list(rows), 0, 0
        for at, state in enumerate(states):
            if state is None:
                continue
            try:
                self._kernel.check(state)
            except ForeignState as error:
                if not foreign_is_missing:
                    found = int.from_bytes(state[len(MAGIC) : len(MAGIC) + 8], "little")
                    raise SchemaChanged(self.schema.name, self.schema.schema_hash, found) from error
                states[at], foreign = None, foreign + 1
            except StateError:
                states[at], unreadable = None, unreadable + 1
        return states, foreign, unreadable
