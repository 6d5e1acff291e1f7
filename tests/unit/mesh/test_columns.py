from __future__ import annotations

import math

import pytest

from services.mesh.columns import IsEntity, IsText, Number, RequestColumns, Stored, parse_column


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("route.late_28d", Stored("route", "late_28d")),
        ("input.hour", Number("hour")),
        ("input.kind=jet", IsText("kind", "jet")),
        ("input.kind=", IsText("kind", "")),
        ("entity.origin=EWR", IsEntity("origin", "EWR")),
        ("entity.route=EWR=LAX.2", IsEntity("route", "EWR=LAX.2")),
    ],
)
def test_a_columns_name_says_where_its_value_comes_from(text: str, column: object) -> None:
    assert parse_column(text) == column


@pytest.mark.parametrize("text", ["", "late", ".late", "route.", "input.", "entity.origin", "entity.=EWR"])
def test_a_name_that_says_nothing_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match="column must be") as error:
        parse_column(text)
    assert repr(text) in str(error.value)


def test_a_row_starts_blank_and_takes_what_the_request_says() -> None:
    names = ["input.hour", "entity.origin=EWR", "route.late", "input.kind=jet", "input.kind=", "input.wind"]
    columns = RequestColumns([parse_column(name) for name in names])
    row = list(columns.blank)
    columns.fill(row, {"origin": "EWR"}, {"hour": 7.0, "unread": 1.0}, {"kind": "prop"})
    assert row[0:2] == [7.0, 1.0]
    assert math.isnan(row[2])
    assert row[3:5] == [0.0, 0.0]  # a kind that is not listed, and one that is given is not the empty one
    assert math.isnan(row[5])
