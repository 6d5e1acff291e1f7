from __future__ import annotations

import math

import numpy as np
import pytest
from ddsketch import DDSketch
from hypothesis import given
from hypothesis import strategies as st

from services.feature.define import sketches

finite = st.floats(-1e300, 1e300)


def estimate(labels: list[str]) -> float:
    registers: dict[int, int] = {}
    for label in labels:
        register, rank = sketches.register_of(label)
        registers[register] = max(rank, registers.get(register, 0))
    harmonic = math.fsum(2.0**-rank for rank in registers.values())
    return float(sketches.distinct(np.array([len(registers)]), np.array([harmonic]))[0])


@pytest.mark.parametrize("n", [1, 10, 500, 5_000, 12_000, 60_000])
def test_distinct_labels_are_estimated_within_five_percent(n: int) -> None:
    assert estimate([f"label {i}" for i in range(n)]) == pytest.approx(n, rel=0.05)


def test_of_no_labels_none_are_distinct() -> None:
    assert estimate([]) == 0.0


def test_a_label_has_the_register_and_rank_of_its_hash() -> None:
    # md5 of the empty text is d41d8cd98f00b204e9800998ecf8427e
    assert sketches.register_of("") == (0xD41, 1)
    assert sketches.code_of("") == 0xD41D8C
    for label in map(str, range(2000)):
        register, rank = sketches.register_of(label)
        assert 0 <= register < sketches.REGISTERS
        assert 1 <= rank <= 53


def test_a_code_is_exact_among_float32() -> None:
    codes = sketches.codes_of([str(n) for n in range(1000)])
    np.testing.assert_array_equal(codes.astype(np.float32).astype(np.int64), codes)


@given(st.lists(finite, min_size=1))
def test_buckets_sort_as_their_values_do(values: list[float]) -> None:
    assert (np.diff(sketches.buckets_of(np.sort(np.array(values)))) >= 0).all()


@given(st.lists(st.floats(1e-9, 1e300), min_size=1))
def test_a_bucket_stands_for_its_values_within_one_percent(sizes: list[float]) -> None:
    for sign in (1, -1):
        values = sign * np.array(sizes)
        found = sketches.bucket_values(sketches.buckets_of(values))
        np.testing.assert_allclose(found, values, rtol=0.01 * (1 + 1e-9))


def test_what_is_next_to_nothing_is_nothing() -> None:
    buckets = sketches.buckets_of(np.array([0.0, -0.0, 1e-10, -9e-10, 1e-9]))
    assert buckets.tolist()[:4] == [0, 0, 0, 0]
    assert buckets[4] > 0
    assert sketches.bucket_values(buckets[:1]).tolist() == [0.0]


@given(st.lists(st.floats(-1e9, 1e9).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1, max_size=60), st.data())
def test_quantiles_are_those_of_the_library(values: list[float], data: st.DataObject) -> None:
    q = data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0]))
    reference = DDSketch(sketches.RELATIVE_ERROR)
    for value in values:
        reference.add(value)
    keys, counts = np.unique(sketches.buckets_of(np.array(values)), return_counts=True)
    rank = sketches.ranks_of(q, np.array([len(values)]))
    found = sketches.bucket_values(keys[[counts.cumsum().searchsorted(rank[0], side="right")]])
    expected = sorted(values)[int(rank[0])]
    # the library walks negative values from the other end, and there takes the next where a rank falls between two
    assert found[0] == pytest.approx(expected, rel=0.0100001)
    if expected > 0:
        assert found[0] == pytest.approx(reference.get_quantile_value(q), rel=1e-9)
