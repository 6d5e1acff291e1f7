"""One stored row as bytes, so that a whole row is one value in the store and nothing is parsed by name.

    offset  bytes
    0       3         magic "tfr"
    3       1         layout version, 2
    4       8         schema hash, unsigned
    12      8         event_us, signed: microseconds since 1970 UTC up to which the row's events were counted
    20      (c+7)//8  null bitmap: column i is NULL where bit i%8 of byte i//8 is set
    ...     4 c       float32 columns in schema order; the column's default where NULL, or NaN
    -4      4         CRC-32 of everything before

All little-endian. A few rows are read as bytes, one by one, as the fixed cost of a numpy call is more than that of a
row; many are read as one array.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from services.feature.define.schema import ViewSchema

MAGIC = b"tfr\x02"  # with the layout's version
EVENT_AT = 12
_NULLS_AT = 20
_SMALLEST = _NULLS_AT + 1 + 4 + 4
# the CRC-32 of anything that ends in its own CRC-32: one call checks a row without slicing it
_INTACT = 0x2144DF1C
_LATEST_EVENT_US = 2**53  # the store's scripts compare times as doubles
_MOST_NULL_PATTERNS = 4096
_MANY_ROWS = 24  # from here on one array costs less than so many rows
_MAGIC = int.from_bytes(MAGIC, "little")

OK, NULL, MISSING, EXPIRED = 1, 2, 3, 4  # tenfold.feature.v1.Status

_event_us = struct.Struct("<q").unpack_from
_schema_hash = struct.Struct("<Q").unpack_from


class SchemaChanged(Exception):
    """A row was packed with another schema of the same view; to read it with ours would be to guess."""

    def __init__(self, view: str, expected: int, found: int) -> None:
        super().__init__(f"a row of view {view!r} has schema {found:016x}, expected {expected:016x}")
        self.found = found


class Rows(NamedTuple):
    """n rows of c columns, as they travel in tenfold.feature.v1.ViewRows.

    values: float32 (n, c), the default or NaN where the status is not OK. status: one byte of Status, (n, c).
    event_us: int64 (n,), 0 where the row is missing. age_s: float32 (n,), NaN where it is missing.
    foreign: rows of another schema. unreadable: rows that are damaged or of an unknown layout. Both are MISSING.
    """

    values: bytes
    status: bytes
    event_us: bytes
    age_s: bytes
    foreign: int = 0
    unreadable: int = 0


class RowLayout:
    """Packs and unpacks the rows of one schema."""

    def __init__(self, schema: ViewSchema) -> None:
        c = len(schema.columns)
        nulls = (c + 7) // 8
        self.schema = schema
        self._prefix = MAGIC + struct.pack("<Q", schema.schema_hash)
        self._values_at = _NULLS_AT + nulls
        self._crc_at = self._values_at + 4 * c
        self._size = self._crc_at + 4
        self._ttl_us = round(schema.ttl_s * 1e6) if schema.ttl_s > 0 else math.inf
        self._no_nulls = bytes(nulls)
        self._defaults = np.array([np.nan if default is None else default for default in schema.defaults], "<f4")
        if not schema.has_defaults:
            self._defaults = np.full(c, np.nan, "<f4")
        self._no_values = self._defaults.tobytes()
        self._ok, self._missing, self._expired = bytes([OK]) * c, bytes([MISSING]) * c, bytes([EXPIRED]) * c
        self._statuses = {self._no_nulls: self._ok}
        body = self._prefix + _NO_EVENT + self._no_nulls + self._no_values
        self._no_row = body + struct.pack("<I", crc32(body))
        self._packed = np.dtype(
            [
                ("magic", "<u4"),
                ("schema_hash", "<u8"),
                ("event_us", "<i8"),
                ("nulls", "u1", (nulls,)),
                ("values", "<f4", (c,)),
                ("crc", "<u4"),
            ]
        )

    @property
    def answer_bytes(self) -> int:
        """What one row adds to a GetFeaturesResponse."""
        return 5 * len(self._ok) + 12

    def pack(
        self,
        event_us: int | NDArray[np.int64],
        values: NDArray[np.floating],
        null: NDArray[np.bool_] | None = None,
    ) -> list[bytes]:
        """One value for the store per row.

        event_us: above 0; one for all rows, or (n,). values: (n, c), within float32.
        null: which values are NULL, (n, c); None where NaN means NULL.
        Raises ValueError naming what does not fit; nothing is packed then.
        """
        c = len(self.schema.columns)
        if values.ndim != 2 or values.shape[1] != c:
            raise ValueError(f"values of view {self.schema.name!r} must have shape (n, {c}), got {values.shape}")
        if null is None:
            null = np.isnan(values)
        elif null.shape != values.shape:
            raise ValueError(f"null must have the shape of values, {values.shape}, got {null.shape}")
        rows = np.zeros(len(values), self._packed)
        rows["magic"] = _MAGIC
        rows["schema_hash"] = self.schema.schema_hash
        rows["event_us"] = _checked_event_us(event_us, len(values))
        rows["nulls"] = np.packbits(null, axis=1, bitorder="little")
        rows["values"] = np.where(null, self._defaults, _float32(values))
        size, crc_at = self._size, self._crc_at
        starts = range(0, len(values) * size, size)
        view = memoryview(rows.tobytes())
        rows["crc"] = [crc32(view[start : start + crc_at]) for start in starts]
        packed = rows.tobytes()
        return [packed[start : start + size] for start in starts]

    def unpack(
        self, rows: Sequence[bytes | None], as_of_us: int | Sequence[int], *, foreign_is_missing: bool = False
    ) -> Rows:
        """What is known of each row at `as_of_us`: one moment for all, or one per row.

        None and unreadable rows are MISSING. A row counts as expired at the age ttl_s. An age is negative where the
        row has counted events after the moment asked for: the store keeps the newest row only, and says so.
        Raises SchemaChanged at a row of another schema, unless `foreign_is_missing`.
        """
        if len(rows) >= _MANY_ROWS and (read := self._unpack_many(rows, as_of_us)) is not None:
            return read
        values: list[bytes] = []
        status: list[bytes] = []
        event_us: list[bytes] = []
        age_s: list[float] = []
        foreign = unreadable = 0
        prefix, size, values_at, crc_at, ttl_us = (
            self._prefix,
            self._size,
            self._values_at,
            self._crc_at,
            self._ttl_us,
        )
        moments: Iterable[int] = itertools.repeat(as_of_us) if isinstance(as_of_us, int) else as_of_us
        for row, moment_us in zip(rows, moments, strict=False):
            if row is not None and len(row) == size and row.startswith(prefix) and crc32(row) == _INTACT:
                age_us = moment_us - _event_us(row, EVENT_AT)[0]
                event_us.append(row[EVENT_AT : EVENT_AT + 8])
                age_s.append(age_us * 1e-6)
                if age_us < ttl_us:
                    values.append(row[values_at:crc_at])
                    status.append(self._statuses.get(nulls := row[_NULLS_AT:values_at]) or self._status_of(nulls))
                else:
                    values.append(self._no_values)
                    status.append(self._expired)
                continue
            if row is not None:
                found = _intact_schema(row)
                if found is None or found == self.schema.schema_hash:
                    unreadable += 1
                elif foreign_is_missing:
                    foreign += 1
                else:
                    raise SchemaChanged(self.schema.name, self.schema.schema_hash, found)
            values.append(self._no_values)
            status.append(self._missing)
            event_us.append(_NO_EVENT)
            age_s.append(math.nan)
        ages = struct.pack(f"<{len(age_s)}f", *age_s)
        return Rows(b"".join(values), b"".join(status), b"".join(event_us), ages, foreign, unreadable)

    def _unpack_many(self, rows: Sequence[bytes | None], as_of_us: int | Sequence[int]) -> Rows | None:
        """As `unpack`; None where a row is damaged or of another schema."""
        missing: list[int] = []
        if not all(rows):
            missing = [i for i, row in enumerate(rows) if row is None]
            rows = [self._no_row if row is None else row for row in rows]
        whole = cast("Sequence[bytes]", rows)
        if set(map(len, whole)) != {self._size} or set(map(crc32, whole)) != {_INTACT}:
            return None
        table = np.frombuffer(b"".join(whole), self._packed)
        if (table["magic"] != _MAGIC).any() or (table["schema_hash"] != self.schema.schema_hash).any():
            return None
        values, age_us = table["values"], np.asarray(as_of_us, np.int64) - table["event_us"]
        status = np.unpackbits(table["nulls"], axis=1, count=len(self._ok), bitorder="little")
        status += OK  # a bit that is set makes it NULL, which is the next number
        age_s = (age_us * 1e-6).astype("<f4")
        if (expired := age_us >= self._ttl_us).any():
            values = np.where(expired[:, None], self._defaults, values)
            status[expired] = EXPIRED
        if missing:
            status[missing], age_s[missing] = MISSING, np.nan
        return Rows(values.tobytes(), status.tobytes(), table["event_us"].tobytes(), age_s.tobytes())

    def _status_of(self, nulls: bytes) -> bytes:
        """The status bytes of a null bitmap; remembered, as few patterns occur."""
        bits = np.unpackbits(np.frombuffer(nulls, np.uint8), count=len(self._ok), bitorder="little")
        if len(self._statuses) >= _MOST_NULL_PATTERNS:
            self._statuses = {self._no_nulls: self._ok}
        status = self._statuses[nulls] = np.where(bits, NULL, OK).astype(np.uint8).tobytes()
        return status


_NO_EVENT = bytes(8)


def _intact_schema(row: bytes) -> int | None:
    """The schema hash of a row that is whole; None for anything else."""
    if len(row) < _SMALLEST or not row.startswith(MAGIC) or crc32(row) != _INTACT:
        return None
    return int(_schema_hash(row, len(MAGIC))[0])


def _checked_event_us(event_us: int | NDArray[np.int64], n: int) -> NDArray[np.int64]:
    times = np.asarray(event_us)
    if times.dtype.kind not in "iu" or times.shape not in ((), (n,)):
        raise ValueError(f"event_us must be an integer or {n} integers, got {times.dtype} {times.shape}")
    if n and (times.min() < 1 or times.max() > _LATEST_EVENT_US):
        raise ValueError(
            f"event_us must be between 1 and 2**53 microseconds since 1970, got {times.min()} to {times.max()}"
        )
    return times.astype(np.int64)


def _float32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    try:
        with np.errstate(over="raise"):
            return values.astype("<f4")
    except FloatingPointError:
        finite = values[np.isfinite(values)]
        raise ValueError(f"values must fit float32, got {finite[np.abs(finite).argmax()]}") from None
