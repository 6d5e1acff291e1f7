"""Three models of one question, from cheap to good, and what stands in for all of them.

linear   a logistic regression on the request and the stored features that mattered most
small    a few shallow trees on the request and a few more of them
full     trees on everything
request  a logistic regression on the request alone: needs no other service
prior    how often flights of an airport and hour were late: needs no model

What mattered most is what the full model gained most from. All is trained on February to September, stopped by
October, and judged on November and December.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from deploy.flights import graphs
from deploy.flights.dataset import FALLBACK_COLUMNS, REQUEST_COLUMNS, STORED_COLUMNS, Dataset, Progress

LINEAR_FEATURES, SMALL_FEATURES = 15, 20
MODEL = "flight_delay"

_BOTH = {
    "objective": "binary",
    "min_data_in_leaf": 200,
    "bagging_fraction": 0.6,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "seed": 7,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,  # the bytes must not depend on cores, and two threads gain little
    "verbose": -1,
}
_FULL = _BOTH | {"num_leaves": 31, "learning_rate": 0.1, "feature_fraction": 0.4, "max_bin": 127}
_SMALL = _BOTH | {"num_leaves": 15, "learning_rate": 0.1, "feature_fraction": 0.6, "max_bin": 127}
_FULL_TREES, _SMALL_TREES, _PATIENCE = 180, 120, 40
_HALF_BELIEVED = 50.0  # flights behind a share that counts as much as the overall one


@dataclass(frozen=True, slots=True)
class Trained:
    """One model, as it will be served.

    onnx: the serialised graph. columns: what it reads, in order. expected: what the library that trained it answers
    for the test flights, float64 (n,): the graph must agree.
    """

    name: str
    onnx: bytes
    columns: tuple[str, ...]
    trees: int
    expected: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Models:
    """tiers: by tier name. request: the fallback model. prior: the fallback table, see `prior`."""

    tiers: Mapping[str, Trained]
    request: Trained
    prior: Mapping[str, Any]


def train(data: Dataset, trained_on: str, progress: Progress = lambda _: None) -> Models:
    """All models. trained_on: a hash of the inputs, kept in each graph."""
    late, training = data.late, data.training()
    everything = (*REQUEST_COLUMNS, *STORED_COLUMNS)
    full, gain = _boosted(data, "full", everything, _FULL, _FULL_TREES, trained_on, lambda done: progress(0.8 * done))
    ranked = [everything[at] for at in np.argsort(-gain, kind="stable")]
    best = [column for column in ranked if column in set(STORED_COLUMNS)]
    small_columns = (*REQUEST_COLUMNS, *best[:SMALL_FEATURES])
    small, _ = _boosted(data, "small", small_columns, _SMALL, _SMALL_TREES, trained_on)
    progress(0.9)
    linear = _linear(data, "linear", (*REQUEST_COLUMNS, *best[:LINEAR_FEATURES]), trained_on)
    request = _linear(data, "request", FALLBACK_COLUMNS, trained_on)
    seen = data.flights.filter(training)
    asked = {
        "entity.origin": seen["origin"].to_pylist(),
        "input.sched_hour": [str(hour) for hour in seen["sched_hour"].to_pylist()],
    }
    table = prior(late[training], asked, [("entity.origin", "input.sched_hour"), ("entity.origin",)])
    progress(1.0)
    return Models({"linear": linear, "small": small, "full": full}, request, table)


def full(data: Dataset, trained_on: str) -> Trained:
    """The full model alone."""
    return _boosted(data, "full", (*REQUEST_COLUMNS, *STORED_COLUMNS), _FULL, _FULL_TREES, trained_on)[0]


def prior(
    late: NDArray[np.int64], asked: Mapping[str, Sequence[str]], tables: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    """How often flights were late: in each table by the values of its columns, and `default` over all.

    A share is drawn towards that of all flights where flights are few.
    late: 0 or 1, (n,). asked: column -> its n values. tables: the columns of each, the most specific first.
    """
    overall = float(late.mean())

    def shares(by: tuple[str, ...]) -> dict[str, list[float]]:
        hits: Counter[str] = Counter()
        flights: Counter[str] = Counter()
        for key, was_late in zip(map("|".join, zip(*(asked[column] for column in by), strict=True)), late, strict=True):
            flights[key] += 1
            hits[key] += int(was_late)
        return {
            key: [round((hits[key] + _HALF_BELIEVED * overall) / (flights[key] + _HALF_BELIEVED), 6)]
            for key in sorted(flights)
        }

    return {
        "output": graphs.OUTPUT,
        "default": [round(overall, 6)],
        "tables": [{"by": list(by), "values": shares(by)} for by in tables],
    }


def _metadata(name: str, trained_on: str) -> dict[str, str]:
    return {"tenfold.model": f"{MODEL}_{name}", "tenfold.trained_on": trained_on}


def _boosted(
    data: Dataset,
    name: str,
    columns: tuple[str, ...],
    parameters: Mapping[str, Any],
    most_trees: int,
    trained_on: str,
    progress: Progress = lambda _: None,
) -> tuple[Trained, NDArray[np.float64]]:
    """The model, and how much each column gained it."""
    late, training, validation = data.late, data.training(), data.validation()
    train_set = lgb.Dataset(data.values(columns, training), late[training], params=dict(parameters))
    check_set = lgb.Dataset(data.values(columns, validation), late[validation], reference=train_set)

    def tell(environment: lgb.callback.CallbackEnv) -> None:
        progress((environment.iteration + 1) / most_trees)

    with warnings.catch_warnings():  # the reference's parameters are the same ones
        warnings.filterwarnings("ignore", message="Overriding the parameters")
        booster = lgb.train(
            dict(parameters),
            train_set,
            most_trees,
            valid_sets=[check_set],
            callbacks=[lgb.early_stopping(_PATIENCE, verbose=False), tell],
        )
    dump = booster.dump_model(num_iteration=booster.best_iteration)
    onnx = graphs.trees(dump, columns, _metadata(name, trained_on))
    expected = booster.predict(data.values(columns, data.test()), num_threads=1)
    gain = booster.feature_importance("gain", iteration=booster.best_iteration)
    return Trained(f"{MODEL}_{name}", onnx, columns, len(dump["tree_info"]), np.asarray(expected)), np.asarray(gain)


def _linear(data: Dataset, name: str, columns: tuple[str, ...], trained_on: str) -> Trained:
    training = data.training()
    values = data.values(columns, training).astype(np.float64)
    fill = np.nanmedian(values, axis=0)
    values = np.where(np.isnan(values), fill, values)
    mean, scale = values.mean(axis=0), values.std(axis=0)
    scale[scale == 0] = 1.0
    fitted = LogisticRegression(max_iter=200).fit((values - mean) / scale, data.late[training])
    model = graphs.Linear(fill, mean, scale, fitted.coef_[0], float(fitted.intercept_[0]))
    test = data.values(columns, data.test()).astype(np.float64)
    standard = (np.where(np.isnan(test), fill, test) - mean) / scale
    expected = 1.0 / (1.0 + np.exp(-(standard @ model.weights + model.bias)))
    onnx = graphs.linear(model, columns, _metadata(name, trained_on))
    return Trained(f"{MODEL}_{name}", onnx, columns, 0, expected)
