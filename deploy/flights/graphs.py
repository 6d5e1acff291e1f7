"""Trained models as ONNX graphs: "features" float32 [n, k] in, "late_probability" float32 [n, 1] out, NaN for null.

The graphs are built node by node: converters add a label output and a map per row, and round thresholds to the
nearest float32, which sends some values down the other branch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

INPUT, OUTPUT = "features", "late_probability"
_OPSET, _ML_OPSET, _IR = 17, 3, 8  # what ONNX Runtime and TensorRT releases of several years all read


@dataclass(frozen=True, slots=True)
class Linear:
    """A logistic regression on standardised values.

    fill: float (k,), what stands in for null. mean, scale: float (k,). weights: float (k,). bias: log-odds.
    """

    fill: NDArray[np.float64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]
    bias: float


def linear(model: Linear, columns: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """The serialised graph: null -> fill, standardise, weigh, sigmoid."""
    constants = [
        _constant("fill", model.fill),
        _constant("mean", model.mean),
        _constant("scale", model.scale),
        _constant("weights", model.weights.reshape(-1, 1)),
        _constant("bias", np.array([model.bias])),
    ]
    nodes = [
        helper.make_node("IsNaN", [INPUT], ["is_null"]),
        helper.make_node("Where", ["is_null", "fill", INPUT], ["filled"]),
        helper.make_node("Sub", ["filled", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "scale"], ["standard"]),
        helper.make_node("Gemm", ["standard", "weights", "bias"], ["log_odds"]),
        helper.make_node("Sigmoid", ["log_odds"], [OUTPUT]),
    ]
    return _serialised(nodes, constants, columns, metadata)


def trees(dump: Mapping[str, Any], columns: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """The serialised graph of a LightGBM binary classifier. dump: Booster.dump_model()."""
    if dump["objective"] != "binary sigmoid:1":
        raise ValueError(f"the model's objective must be 'binary sigmoid:1', got {dump['objective']!r}")
    nodes: dict[str, list[Any]] = {key: [] for key in _NODE_KEYS}
    leaves: dict[str, list[Any]] = {key: [] for key in _LEAF_KEYS}
    for tree in dump["tree_info"]:
        for node in _numbered(tree["tree_structure"]):
            _add(nodes, leaves, tree["tree_index"], node)
    attributes: dict[str, Any] = {**nodes, **leaves, "n_targets": 1, "aggregate_function": "SUM"}
    ensemble = helper.make_node(
        "TreeEnsembleRegressor",
        [INPUT],
        ["log_odds"],
        domain="ai.onnx.ml",
        **attributes,
    )
    return _serialised([ensemble, helper.make_node("Sigmoid", ["log_odds"], [OUTPUT])], [], columns, metadata)


_NODE_KEYS = (
    "nodes_treeids", "nodes_nodeids", "nodes_featureids", "nodes_values", "nodes_modes", "nodes_truenodeids",
    "nodes_falsenodeids", "nodes_missing_value_tracks_true",
)  # fmt: skip
_LEAF_KEYS = ("target_treeids", "target_nodeids", "target_ids", "target_weights")


@dataclass(frozen=True, slots=True)
class _Node:
    """One node of a tree. left, right: numbers of its children, -1 in a leaf."""

    number: int
    structure: Mapping[str, Any]
    left: int = -1
    right: int = -1


def _numbered(root: Mapping[str, Any]) -> Iterator[_Node]:
    """A tree's nodes, the root first and numbered 0."""
    waiting, given = [(0, root)], 1
    while waiting:
        number, structure = waiting.pop(0)
        if "leaf_value" in structure:
            yield _Node(number, structure)
            continue
        yield _Node(number, structure, given, given + 1)
        waiting += [(given, structure["left_child"]), (given + 1, structure["right_child"])]
        given += 2


def _add(nodes: dict[str, list[Any]], leaves: dict[str, list[Any]], tree: int, node: _Node) -> None:
    is_leaf, structure = node.left < 0, node.structure
    if is_leaf:
        row = (tree, node.number, 0, 0.0, "LEAF", 0, 0, 0)
        for key, value in zip(_LEAF_KEYS, (tree, node.number, 0, structure["leaf_value"]), strict=True):
            leaves[key].append(value)
    else:
        feature, threshold, null_left = structure["split_feature"], structure["threshold"], _null_goes_left(structure)
        row = (tree, node.number, feature, floor32(threshold), "BRANCH_LEQ", node.left, node.right, int(null_left))
    for key, value in zip(_NODE_KEYS, row, strict=True):
        nodes[key].append(value)


def _null_goes_left(split: Mapping[str, Any]) -> bool:
    """Where LightGBM sends NaN: a feature that was never null in training has its NaN read as 0."""
    if split["decision_type"] != "<=" or split["missing_type"] not in ("None", "NaN"):
        raise ValueError(f"a split must be <= with missing type None or NaN, got {split}")
    return bool(split["default_left"]) if split["missing_type"] == "NaN" else split["threshold"] >= 0.0


def floor32(threshold: float) -> float:
    """The largest float32 that is not above `threshold`: for every float32 x, x <= it exactly when x <= threshold."""
    with np.errstate(over="ignore"):  # LightGBM's "everything that is not null" is the largest float64
        nearest = np.float32(threshold)
    if float(nearest) > threshold:
        nearest = np.nextafter(nearest, np.float32(-math.inf))
    return float(nearest)


def _constant(name: str, values: NDArray[np.float64]) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)


def _serialised(
    nodes: Sequence[Any], constants: Sequence[TensorProto], columns: Sequence[str], metadata: Mapping[str, str]
) -> bytes:
    k = len(columns)
    graph = helper.make_graph(
        nodes,
        metadata["tenfold.model"],
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [None, k])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [None, 1])],
        list(constants),
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("ai.onnx.ml", _ML_OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR, producer_name="tenfold")
    helper.set_model_props(model, {"tenfold.columns": json.dumps(list(columns)), **metadata})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))
