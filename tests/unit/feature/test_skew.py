import numpy as np
import pytest

from services.feature.check.skew import compare
from services.feature.define.rows import Computed

NAN, INF = float("nan"), float("inf")


def computed(values: list[list[float]], null: list[list[bool]]) -> Computed:
    return Computed(np.array(values), np.array(null), np.ones(len(values), bool))


def test_equal_rows_have_no_skew() -> None:
    given = np.array([[1.0, NAN], [2.0, INF]], np.float32)
    null = np.array([[False, False], [False, False]])
    found = compare("v", ["a", "b"], given, null, computed([[1.0, NAN], [2.0, INF]], [[False] * 2] * 2))
    assert [(column.mismatched, column.worst, column.worst_row) for column in found] == [(0, 0.0, -1), (0, 0.0, -1)]


def test_rounding_to_float32_is_no_skew_but_a_part_in_ten_thousand_is() -> None:
    given = np.array([[0.1], [0.1]], np.float32)
    null = np.zeros((2, 1), bool)
    (column,) = compare("v", ["a"], given, null, computed([[0.1], [0.10001]], [[False], [False]]))
    assert (column.mismatched, column.worst_row) == (1, 1)
    assert column.worst == pytest.approx(1e-4, rel=0.01)


def test_a_null_is_neither_nan_nor_zero() -> None:
    given = np.array([[NAN], [0.0], [5.0]], np.float32)
    null = np.array([[False], [False], [True]])
    (column,) = compare("v", ["a"], given, null, computed([[0.0], [0.0], [5.0]], [[True], [True], [True]]))
    assert (column.mismatched, column.worst) == (2, INF)
    assert (column.null_given, column.null_expected) == (pytest.approx(1 / 3), 1.0)


def test_a_shift_of_the_distribution_is_measured() -> None:
    given = np.arange(1000, dtype=np.float32)[:, None]
    (column,) = compare(
        "v", ["a"], given, np.zeros((1000, 1), bool), computed((given + 500.0).tolist(), [[False]] * 1000)
    )
    assert column.shift == pytest.approx(0.5)
    assert column.quantiles_expected[1] - column.quantiles_given[1] == pytest.approx(500)
    assert column.share == 1.0


def test_no_rows_are_no_skew() -> None:
    empty = computed([], []).values.reshape(0, 1)
    (column,) = compare("v", ["a"], empty.astype(np.float32), empty > 0, Computed(empty, empty > 0, np.zeros(0, bool)))
    assert (column.rows, column.mismatched, column.share, column.shift) == (0, 0, 0.0, 0.0)


def test_rows_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="same shape"):
        compare("v", ["a"], np.zeros((2, 1), np.float32), np.zeros((2, 1), bool), computed([[0.0]], [[False]]))
