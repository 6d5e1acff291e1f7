from __future__ import annotations

import json
import math
from typing import Any

import lightgbm as lgb
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deploy.flights import graphs
from deploy.flights.evaluate import run

METADATA = {"tenfold.model": "m", "tenfold.trained_on": "abc"}
COLUMNS = ["view.a", "input.b", "entity.c=d"]


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    """Values of few kinds, so that many lie on a threshold; column 0 is null now and then, column 1 never."""
    rng = np.random.default_rng(0)
    values = rng.choice([0.1, 0.2, 0.3, -7.7, 1e-30, 3e8], (4_000, 3)).astype(np.float32)
    values[rng.random(4_000) < 0.2, 0] = np.nan
    return values


@pytest.fixture(scope="module")
def booster(rows: NDArray[np.float32]) -> lgb.Booster:
    late = (np.nan_to_num(rows[:, 0], nan=0.25) + rows[:, 1] > 0.35).astype(int)
    late[::7] ^= 1
    parameters = {"objective": "binary", "num_leaves": 15, "min_data_in_leaf": 5, "verbose": -1, "num_threads": 1}
    return lgb.train(parameters, lgb.Dataset(rows, late), 20)


def test_trees_answer_as_lightgbm_does_on_thresholds_nulls_and_extremes(
    rows: NDArray[np.float32], booster: lgb.Booster
) -> None:
    graph = graphs.trees(booster.dump_model(), COLUMNS, METADATA)
    edges = np.array([[np.nan] * 3, [np.inf] * 3, [-np.inf] * 3, [0, np.nan, 0]], dtype=np.float32)
    asked = np.concatenate([rows, edges])
    assert np.abs(run(graph, asked) - booster.predict(asked)).max() < 1e-6


def test_a_linear_graph_fills_nulls_then_standardises_and_weighs() -> None:
    k3 = np.array
    model = graphs.Linear(k3([5.0, 0, 0]), k3([1.0, 2, 0]), k3([2.0, 4, 1]), k3([0.5, -1, 3]), bias=0.25)
    asked = np.array([[3, 6, 1], [np.nan, 6, 1]], dtype=np.float32)
    expected = [1 / (1 + math.exp(-z)) for z in (0.5 * 1 - 1 + 3 + 0.25, 0.5 * 2 - 1 + 3 + 0.25)]
    assert run(graphs.linear(model, COLUMNS, METADATA), asked) == pytest.approx(expected, rel=1e-6)


def test_a_graph_has_one_input_one_output_and_names_its_columns(booster: lgb.Booster) -> None:
    model = onnx.load_from_string(graphs.trees(booster.dump_model(), COLUMNS, METADATA))

    def shapes(values: Any) -> list[tuple[str, list[int | str]]]:
        return [(v.name, [d.dim_value or -1 for d in v.type.tensor_type.shape.dim]) for v in values]

    assert shapes(model.graph.input) == [("features", [-1, 3])]
    assert shapes(model.graph.output) == [("late_probability", [-1, 1])]
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(props.pop("tenfold.columns")) == COLUMNS
    assert props == METADATA


@given(st.floats(allow_nan=False), st.floats(allow_nan=False, width=32))
def test_a_rounded_threshold_divides_float32_as_the_exact_one_does(threshold: float, x: float) -> None:
    assert (x <= graphs.floor32(threshold)) == (x <= threshold)


@given(st.floats(allow_nan=False, width=32), st.integers(-2, 2))
def test_also_right_beside_the_threshold(x: float, steps: int) -> None:
    threshold = x
    for _ in range(abs(steps)):
        threshold = math.nextafter(threshold, math.copysign(math.inf, steps))
    assert (x <= graphs.floor32(threshold)) == (x <= threshold)


def test_a_model_of_another_kind_is_refused(rows: NDArray[np.float32]) -> None:
    regression = lgb.train(
        {"objective": "l2", "verbose": -1, "num_threads": 1}, lgb.Dataset(rows, rows[:, 1].copy()), 1
    )
    with pytest.raises(ValueError, match="objective must be 'binary sigmoid:1', got 'regression'"):
        graphs.trees(regression.dump_model(), COLUMNS, METADATA)


def test_a_split_on_categories_is_refused() -> None:
    split = {"decision_type": "==", "missing_type": "None", "threshold": "1||2", "split_feature": 0}
    leaf = {"leaf_value": 0.1}
    tree = {"tree_index": 0, "tree_structure": {**split, "left_child": leaf, "right_child": leaf}}
    with pytest.raises(ValueError, match="a split must be <= with missing type None or NaN"):
        graphs.trees({"objective": "binary sigmoid:1", "tree_info": [tree]}, COLUMNS, METADATA)
