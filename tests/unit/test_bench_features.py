"""The arithmetic of the feature benchmark; what it measures is not tested here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from loadtest.bench.feature_arms import contract
from loadtest.bench.feature_arms.compare import best, facts, no_less, no_more, ratio
from loadtest.bench.feature_arms.sizes import FULL, START_US
from loadtest.bench.feature_arms.truth import as_of, wrong_rows
from loadtest.bench.report import emit

NAN = float("nan")


def test_a_ratio_compares_rounds_with_each_other_so_that_a_bad_round_of_both_is_none() -> None:
    assert ratio([10.0, 100.0, 12.0], [5.0, 50.0, 6.0]) == 2.0


def test_rounds_that_the_peer_did_not_run_are_not_compared() -> None:
    assert ratio([10.0, 20.0, 900.0], [5.0, 10.0]) == 2.0


def test_less_is_wanted_of_costs_and_more_of_rates() -> None:
    measured = {"ours": [2.0], "floor": [1.0]}
    assert no_more("CPU", measured, "ours", "floor", 1.5).holds is False
    assert no_more("CPU", measured, "ours", "floor", 2.0).holds is True
    assert no_less("rate", measured, "ours", "floor", 2.0).holds is True
    assert no_less("rate", measured, "ours", "floor", 2.1).holds is False


def test_a_row_against_a_peer_that_was_left_out_says_so_and_holds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    row = no_more("CPU", {"ours": [2.0]}, "ours", "Feast", 0.1)
    assert math.isnan(row.value)
    assert (row.against, row.goal, row.holds) == ("Feast, left out", "<= 0.1", None)
    emit("features", [row])
    said = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=lambda name: pytest.fail(name))
    assert said["rows"][0]["value"] is None


def test_arms_without_a_measurement_have_no_row() -> None:
    assert [row.measure for row in facts("CPU", {"ours": [3.0, 1.0, 2.0], "Feast": []}, "ms")] == ["CPU, ours"]


def test_the_best_limit_is_the_one_with_the_largest_median() -> None:
    assert best({"a": [1.0, 9.0, 1.0], "b": [2.0, 2.0, 2.0], "c": [9.0]}, ["a", "b"]) == "b"


def test_labels_grow_with_the_events() -> None:
    assert (FULL.labels("1x"), FULL.labels("10x")) == (20_000, 200_000)


def test_the_truth_is_the_latest_event_strictly_before_the_moment() -> None:
    entity = np.array([3, 1, 3, 3])
    event_us = START_US + np.array([20, 5, 10, 30])
    values = np.array([[2.0], [9.0], [1.0], [3.0]], np.float32)
    asked = np.array([3, 3, 3, 3, 1, 2])
    moment_us = START_US + np.array([10, 11, 30, 99, 6, 99])
    found = as_of(entity, event_us, values, asked, moment_us)[:, 0]
    np.testing.assert_array_equal(found, np.array([NAN, 1.0, 2.0, 3.0, 9.0, NAN], np.float32))


def test_two_nulls_are_the_same_and_a_null_is_not_a_value() -> None:
    expected = np.array([[1.0, NAN], [1.0, NAN], [1.0, 2.0]], np.float32)
    got = np.array([[1.0, NAN], [1.0, 0.0], [1.0, NAN]], np.float32)
    assert wrong_rows(got, expected) == 2


def test_rows_that_are_missing_altogether_count_as_wrong() -> None:
    assert wrong_rows(np.zeros((1, 2), np.float32), np.zeros((3, 2), np.float32)) == 3


def test_the_contract_counts_cases_that_are_there_and_right() -> None:
    right = {label.case: label.x for label in contract.LABELS}
    assert contract.right_rows(right) == len(contract.LABELS) == 8
    assert contract.right_rows(right, at_the_moment=5.0) == 7
    assert contract.right_rows({case: x for case, x in right.items() if x is not None}) == 3
    assert contract.right_rows(right | {"expired": 4.0}) == 7
