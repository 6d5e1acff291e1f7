from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.mesh.meshfile import Model, RequiredQuality, Tier
from services.mesh.query import Query
from services.resilience.errors import BadInput
from services.router.plan import ModelPlan, PlanError, TierPlan, ViewShape, make_plan
from tenfold.router.v1.router_pb2 import PredictRequest

TIER = Tier("full", "m_full", 0.8, 1.0, 10)
MODEL = Model("m", "p", [TIER], RequiredQuality(0.5, 0.5, 0.5))
VIEWS = {
    "route": ViewShape("route", "route", ("late", "flights", "distance"), 11),
    "tail": ViewShape("tail", "tailnum", ("age", "late"), 22),
}
NAMES = (
    "tail.late",
    "input.hour",
    "entity.origin=EWR",
    "route.distance",
    "entity.origin=JFK",
    "route.late",
    "input.kind=jet",
)


def plan_of(names: tuple[str, ...] = NAMES) -> TierPlan:
    return make_plan(TIER, "1", "CPUExecutionProvider", names, VIEWS)


def query(
    entities: dict[str, str], numbers: dict[str, float] | None = None, texts: dict[str, str] | None = None
) -> Query:
    return Query(PredictRequest(), MODEL, entities, numbers or {}, texts or {})


def rows_of(plan: TierPlan, side_by_side: NDArray[np.float32]) -> NDArray[np.float32]:
    """Model input from a table that has the plan's views side by side, given as the feature service gives it."""
    ends = np.cumsum([len(view.columns) for view in plan.views])[:-1]
    joined = np.concatenate([part.ravel() for part in np.split(side_by_side, ends, axis=1)])
    return plan.rows(len(side_by_side), joined, plan.places.of(len(side_by_side)))


def test_stored_values_request_numbers_and_one_hots_each_find_their_column() -> None:
    plan = plan_of()
    assert [view.name for view in plan.views] == ["tail", "route"]
    side_by_side = np.array([[1, 2, 10, 20, 30]], np.float32)  # tail.age tail.late, route.late .flights .distance
    (row,) = rows_of(plan, side_by_side)
    plan.complete(row, query({"origin": "JFK"}, {"hour": 17.0}, {"kind": "jet"}))
    assert row.tolist() == [2, 17, 0, 30, 1, 10, 1]


def test_what_a_request_leaves_out_is_null_and_what_it_does_not_match_is_zero() -> None:
    plan = plan_of()
    (row,) = rows_of(plan, np.zeros((1, 5), np.float32))
    plan.complete(row, query({"origin": "LGA"}))
    assert math.isnan(row[1])
    assert [row[2], row[4], row[6]] == [0, 0, 0]


def test_rows_of_a_batch_share_nothing() -> None:
    plan = plan_of()
    first, second = rows_of(plan, np.zeros((2, 5), np.float32))
    plan.complete(first, query({"origin": "EWR"}, {"hour": 3.0}))
    assert math.isnan(second[1])
    assert math.isnan(plan.blank[1])


@given(st.permutations(["route.late", "route.flights", "route.distance", "tail.age", "tail.late"]), st.integers(1, 4))
def test_whatever_the_order_of_columns_each_gets_its_own_value(names: list[str], rows: int) -> None:
    plan = plan_of(tuple(names))
    values = {name: float(100 * i) for i, name in enumerate(sorted(names))}
    row = [values[f"{view.name}.{column}"] for view in plan.views for column in view.columns]
    table = np.array([row] * rows, np.float32) + np.arange(rows, dtype=np.float32)[:, np.newaxis]
    assert rows_of(plan, table).tolist() == [[values[name] + i for name in names] for i in range(rows)]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ghost.late", "reads view 'ghost'; there are route, tail"),
        ("route.ghost", "reads route.ghost; the view has no such column"),
        ("late", "a column must be <view>.<column>"),
        ("entity.origin", "an entity column must be entity.<entity>=<id>, got 'entity.origin'"),
    ],
)
def test_a_model_that_reads_what_does_not_exist_is_named(name: str, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        plan_of((name,))


def test_a_column_named_twice_is_refused() -> None:
    with pytest.raises(PlanError, match="must not name a column twice"):
        plan_of(("route.late", "route.late"))


def test_plans_are_alike_only_if_version_columns_and_schema_are() -> None:
    assert plan_of().identity == plan_of().identity
    assert plan_of().identity != plan_of(NAMES[::-1]).identity
    assert plan_of().identity != make_plan(TIER, "2", "CPUExecutionProvider", NAMES, VIEWS).identity
    changed = VIEWS | {"tail": ViewShape("tail", "tailnum", ("age", "late"), 23)}
    assert plan_of().identity != make_plan(TIER, "1", "CPUExecutionProvider", NAMES, changed).identity


def test_entities_and_kinds_of_every_tier_are_checked_together() -> None:
    tiers = {"full": plan_of(), "small": plan_of(("route.late", "input.wind"))}
    model = ModelPlan(MODEL, tiers)
    model.check(query({"route": "a", "tailnum": "b"}, {"hour": 1.0, "unread": 2.0}, {"kind": "jet"}))
    with pytest.raises(BadInput) as bad:
        model.check(query({"route": "a"}, {"kind": 1.0}, {"wind": "strong"}))
    assert [violation.field for violation in bad.value.violations] == [
        "entities[tailnum]",
        "inputs[wind]",
        "inputs[kind]",
    ]


def test_an_input_that_tiers_read_as_either_kind_may_be_either() -> None:
    model = ModelPlan(MODEL, {"full": plan_of(("input.kind", "input.kind=jet"))})
    model.check(query({}, {"kind": 1.0}))
    model.check(query({}, {}, {"kind": "jet"}))
