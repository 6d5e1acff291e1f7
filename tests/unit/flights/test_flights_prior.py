from __future__ import annotations

import numpy as np
import pytest

from deploy.flights.train import prior

LATE = np.array([1] * 300 + [0] * 100 + [1] * 1 + [0] * 599)
ASKED = {
    "entity.origin": ["EWR"] * 400 + ["JFK"] * 600,
    "input.sched_hour": ["17"] * 400 + ["6"] * 1 + ["7"] * 599,
}


def test_shares_are_by_the_values_of_the_columns_and_the_default_is_over_all() -> None:
    table = prior(LATE, ASKED, [("entity.origin", "input.sched_hour"), ("entity.origin",)])
    assert table["default"] == [0.301]
    assert [entry["by"] for entry in table["tables"]] == [["entity.origin", "input.sched_hour"], ["entity.origin"]]
    assert set(table["tables"][0]["values"]) == {"EWR|17", "JFK|6", "JFK|7"}
    assert table["tables"][1]["values"]["EWR"][0] == pytest.approx(0.75, abs=0.06)


def test_a_single_flight_says_little_about_its_hour() -> None:
    shares = prior(LATE, ASKED, [("input.sched_hour",)])["tables"][0]["values"]
    assert shares["6"][0] == pytest.approx(0.301, abs=0.02)
    assert shares["7"][0] < 0.05
