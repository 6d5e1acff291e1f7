"""What the exported graphs are worth on flights that no model saw, and whether they answer as trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from deploy.flights import graphs
from deploy.flights.dataset import Dataset
from deploy.flights.train import Models, Trained

MOST_MEAN_DIFFERENCE = 1e-4


class ParityError(RuntimeError):
    """A graph answers other than the model it was exported from."""


def evaluate(data: Dataset, models: Models) -> dict[str, Any]:
    """What goes into evaluation.json. Raises ParityError."""
    test = data.test()
    late = data.late[test]
    return {
        "flights": len(data.flights),
        "test_flights": len(late),
        "base_rate": round(float(late.mean()), 4),
        "trained_flights": int(data.training().sum()),
        "stored_features": sum(rows.shape[1] for rows in data.rows.values()),
        "tiers": {name: _judged(data, model, late) for name, model in models.tiers.items()},
        "fallback": {
            "request": _judged(data, models.request, late),
            "prior": {"auc": round(float(roc_auc_score(late, _prior_answers(data, models.prior))), 4)},
        },
    }


def run(onnx: bytes, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The graph's answers, float32 (n,)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([graphs.OUTPUT], {graphs.INPUT: values})[0]).reshape(-1)


def _judged(data: Dataset, model: Trained, late: NDArray[np.int64]) -> dict[str, Any]:
    answers = run(model.onnx, data.values(model.columns, data.test()))
    difference = np.abs(answers - model.expected)
    if not difference.mean() < MOST_MEAN_DIFFERENCE:
        raise ParityError(
            f"{model.name}: the graph must answer as the trained model within {MOST_MEAN_DIFFERENCE} on average, "
            f"got {difference.mean():.2g}"
        )
    return {
        "auc": round(float(roc_auc_score(late, answers)), 4),
        "mean_answer": round(float(answers.mean()), 4),
        "columns": len(model.columns),
        "views": len({column.partition(".")[0] for column in model.columns} - {"input", "entity"}),
        "trees": model.trees,
        "onnx_bytes": len(model.onnx),
        "parity_mean": float(f"{difference.mean():.2g}"),
        "parity_max": float(f"{difference.max():.2g}"),
    }


def _prior_answers(data: Dataset, document: Mapping[str, Any]) -> NDArray[np.float64]:
    flights, (most_specific, *_) = data.flights.filter(data.test()), document["tables"]
    values = (flights[column.partition(".")[2]].to_pylist() for column in most_specific["by"])
    keys = ("|".join(map(str, parts)) for parts in zip(*values, strict=True))
    return np.array([most_specific["values"].get(key, document["default"])[0] for key in keys])
