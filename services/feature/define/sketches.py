"""Summaries of many labels or values that stay small and merge: which registers, codes and buckets they consist of.

    distinct   HyperLogLog: a label's register, and how rare its hash is there; the largest counts
    top        a label's code, and how often it came
    quantile   DDSketch: a value's bucket, and how many fell into it

Each is a set of (key, count); merging takes the larger count of a register, and adds those of codes and buckets. The
SQL in `services.feature.offline.sql` works with the same keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import md5

import numpy as np
from numpy.typing import NDArray

REGISTERS = 4096
_ALPHA = 0.7213 / (1 + 1.079 / REGISTERS)
_HASH_BITS = 52  # after the register's 12, the next 13 hexadecimal digits
MOST_CODES = 1024
"""Codes that one tile of a stream keeps, the most frequent; offline keeps all."""

RELATIVE_ERROR = 0.01
GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
LN_GAMMA = math.log(GAMMA)
SMALLEST = 1e-9  # closer to 0 counts as 0
ZERO_AT = 2048  # keeps the buckets of positive values above 0, and their order

_KNOWN_LABELS = 1 << 16


@lru_cache(_KNOWN_LABELS)
def register_of(label: str) -> tuple[int, int]:
    """The label's register, 0 to 4095, and 1 + the leading zeros of the hash's next 52 bits, 1 to 53."""
    digits = md5(label.encode(), usedforsecurity=False).hexdigest()
    return int(digits[:3], 16), 1 + _HASH_BITS - int(digits[3:16], 16).bit_length()


@lru_cache(_KNOWN_LABELS)
def code_of(label: str) -> int:
    """What stands for a label among numbers: 24 bits of its MD5, which float32 holds exactly."""
    return int(md5(label.encode(), usedforsecurity=False).hexdigest()[:6], 16)


def registers_of(labels: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Registers and ranks, each (n,)."""
    both = np.array([register_of(label) for label in labels], dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def codes_of(labels: Sequence[str]) -> NDArray[np.int64]:
    return np.array([code_of(label) for label in labels], dtype=np.int64)


def buckets_of(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bucket of each finite value: 0 near 0, else of the value's sign; they sort as values do."""
    size = np.abs(values)
    with np.errstate(divide="ignore"):
        exponent = np.ceil(np.log(size) / LN_GAMMA)
    near_zero = size < SMALLEST
    exponent[near_zero] = 0
    buckets = np.where(values < 0, -1, 1) * (ZERO_AT + exponent.astype(np.int64))
    buckets[near_zero] = 0
    return buckets


def bucket_values(buckets: NDArray[np.int64]) -> NDArray[np.float64]:
    """The value that stands for each bucket: within 1 % of all that fall into it."""
    size = 2 * np.power(GAMMA, (np.abs(buckets) - ZERO_AT).astype(np.float64)) / (GAMMA + 1)
    return np.sign(buckets) * size


def distinct(filled: NDArray[np.integer], harmonic: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many labels there were.

    filled: how many registers are not empty. harmonic: the sum of 2**-rank over them. Both (n,).
    """
    empty = REGISTERS - filled
    estimate = _ALPHA * REGISTERS**2 / (harmonic + empty)
    few = (estimate <= 2.5 * REGISTERS) & (empty > 0)
    return np.where(few, REGISTERS * np.log(REGISTERS / np.maximum(empty, 1)), estimate)


def ranks_of(q: float, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which value, counted from 0 in ascending order, is the quantile q of `counts` values (at least 1 each)."""
    return np.asarray(np.floor(q * (counts - 1)), dtype=np.int64)
