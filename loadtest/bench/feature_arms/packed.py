"""The floor: one value per view and entity, and nothing that a product needs: no checks, no nulls, no later schema.

8 bytes of schema hash, 8 bytes of event time, 25 float32; little-endian.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loadtest.bench.feature_arms.sizes import COLUMNS, FEATURES, PER_VIEW, VIEWS

ROW = np.dtype([("schema", "<u8"), ("event_us", "<i8"), ("values", "<f4", (PER_VIEW,))])
_MISSING = np.array([(0, 0, np.nan)], ROW).tobytes()
_PREFIXES = [f"p:{view}:".encode() for view in VIEWS]


def keys(ids: Sequence[bytes]) -> list[bytes]:
    """Of every view's rows, view by view."""
    return [prefix + entity_id for prefix in _PREFIXES for entity_id in ids]


def pack(view: str, event_us: NDArray[np.int64], values: NDArray[np.float32]) -> list[bytes]:
    rows = np.empty(len(values), ROW)
    name = "\n".join((view, *FEATURES[view])).encode()
    rows["schema"] = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    rows["event_us"] = event_us
    rows["values"] = values
    packed = rows.tobytes()
    return [packed[start : start + ROW.itemsize] for start in range(0, len(packed), ROW.itemsize)]


def unpack(rows: Sequence[bytes | None]) -> NDArray[np.float32]:
    """float32 (n, 50), from the values of `keys`; NaN where there is none."""
    joined = b"".join([_MISSING if row is None else row for row in rows])
    by_view = np.frombuffer(joined, ROW)["values"].reshape(len(VIEWS), -1, PER_VIEW)
    return by_view.transpose(1, 0, 2).reshape(-1, len(COLUMNS))
