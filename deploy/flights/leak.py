"""What a leak promises and what it delivers: one model trained twice, on features joined by two different clocks.

A flight is due to leave at ten; when it will have landed is known at one. Who joins flights by when they were due, as
tables often are, lets a prediction at noon learn from it. Offline that looks like a better model. Online those features
do not exist yet, and the model is worse than an honest one. `tenfold features check --training-set` tells the two
training sets apart before anything is deployed.

The labels are every third flight, so that it takes a minute or two; the features are of the events of all flights.

    python -m deploy.flights.leak
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from deploy.flights import evaluate, train
from deploy.flights.data import write_events
from deploy.flights.dataset import Dataset, read_flights
from deploy.flights.views import VIEWS
from services.feature.check.checks import Checked, training
from services.feature.define.definitions import Definitions
from services.feature.offline.store import Clock, OfflineStore
from services.feature.offline.training import Labels, Wanted, training_set

_EVERY = 3  # of the flights one is a label: the models are a little worse for it, both alike


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model trained on features joined by `clock` is worth on the held-out flights, as AUC.

    promised: judged by features joined likewise. delivered: by those that are there when a flight is asked for.
    """

    clock: Clock
    promised: float
    delivered: float
    check: Checked

    @property
    def skewed(self) -> list[str]:
        """Features that differ from what was known, the most often first."""
        found = sorted((column for column in self.check.columns if column.mismatched), key=lambda one: -one.share)
        return [f"{column.view}.{column.column} ({column.share:.0%})" for column in found]


def compare(home: Path, console: Console) -> list[Outcome]:
    """Joins, trains, judges and checks. Events, labels and training sets stay below `home`/leak."""
    folder = home / "leak"
    events = folder / "offline"
    console.print("writing events", style="dim")
    write_events(events)
    offline, flights = OfflineStore(events), read_flights(events)
    flights = flights.take(pa.array(range(0, len(flights), _EVERY))).combine_chunks()
    labels = _labels(flights, folder)
    rows = {clock: _joined(offline, labels, home, clock, console) for clock in Clock}
    honest = Dataset(flights, rows[Clock.KNOWN])
    outcomes = []
    for clock in Clock:
        console.print(f"training on features joined by {_BY[clock]}", style="dim")
        made = Dataset(flights, rows[clock])
        model = train.full(made, f"leak demonstration, {clock.value}")
        late = made.late[made.test()]
        promised, delivered = (
            float(roc_auc_score(late, evaluate.run(model.onnx, data.values(model.columns, data.test()))))
            for data in (made, honest)
        )
        console.print("checking what was joined against what was known", style="dim")
        check = training(offline, Definitions(VIEWS), str(folder / clock.value))
        outcomes.append(Outcome(clock, promised, delivered, check))
    return outcomes


_BY = {Clock.KNOWN: "when it became known", Clock.EVENT: "when flights were due"}


def _labels(flights: pa.Table, folder: Path) -> Labels:
    """One row per flight, as a team would have it."""
    folder.mkdir(parents=True, exist_ok=True)
    entities = dict.fromkeys(view.entity for view in VIEWS)
    columns = ["flight_id", "predict_at_us", "late", *entities]
    pa.parquet.write_table(flights.select(columns), folder / "labels.parquet")
    return Labels(str(folder / "labels.parquet"), "predict_at_us", {})


def _joined(
    offline: OfflineStore, labels: Labels, home: Path, clock: Clock, console: Console
) -> dict[str, NDArray[np.float32]]:
    """The training set's features: view -> float32 (flights, columns)."""
    out = home / "leak" / clock.value
    console.print(f"joining {len(VIEWS)} views by {_BY[clock]}", style="dim")
    training_set(offline, labels, Wanted(VIEWS, clock=clock), str(out), restart=True)
    table = pa.dataset.dataset(sorted(map(str, out.glob("*.parquet")))).to_table().sort_by("flight_id")
    rows = {}
    for view in VIEWS:
        columns = [table[f"{view.name}.{column}"].to_numpy() for column in view.columns]
        rows[view.name] = np.stack(columns, axis=1).astype(np.float32)
    return rows


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    table = Table("joined by", "promised", "delivered", "features check", box=box.SIMPLE)
    for outcome in outcomes:
        verdict = "agrees"
        if not outcome.check.agrees:
            verdict = f"LEAK: {len(outcome.skewed)} of {len(outcome.check.columns)} differ"
        table.add_row(_BY[outcome.clock], f"{outcome.promised:.3f}", f"{outcome.delivered:.3f}", verdict)
    console.print(table)
    console.print(
        f"Labels are one flight in {_EVERY}, features are of the events of all; judged on November and December."
    )
    for outcome in outcomes:
        if outcome.skewed:
            console.print("differ most, by share of rows:")
            for name in outcome.skewed[:5]:
                console.print(f"  {name}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the check tells the leaky training set from the honest one."""
    parser = argparse.ArgumentParser(prog="python -m deploy.flights.leak", description="Shows what a leak costs.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args(arguments)
    home = Path(os.environ.get("TENFOLD_HOME", ".tenfold"))
    outcomes = compare(home, Console(stderr=True, quiet=given.json))
    if given.json:
        print(json.dumps({outcome.clock.value: _plain(outcome) for outcome in outcomes}))
    else:
        show(outcomes, Console())
    caught = {outcome.clock: not outcome.check.agrees for outcome in outcomes}
    return 0 if caught == {Clock.KNOWN: False, Clock.EVENT: True} else 1


def _plain(outcome: Outcome) -> dict[str, object]:
    return {
        "promised": round(outcome.promised, 4),
        "delivered": round(outcome.delivered, 4),
        "agrees": outcome.check.agrees,
        "differ": outcome.skewed,
        "notes": list(outcome.check.notes),
    }


if __name__ == "__main__":
    sys.exit(main())
