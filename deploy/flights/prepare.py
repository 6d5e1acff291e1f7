"""Everything the demonstration needs that is not in the repository: events, features, models.

Made once below $TENFOLD_HOME/flights and made again only when the data's package, the definitions, this code or a
library that shapes the result is another:

    offline/flights/*.parquet, offline/weather/*.parquet   events
    models/<model>/1/model.onnx                            the tiers
    fallback/flight_delay_request.onnx, _prior.json        what stands in for them
    base/<view>.parquet                                    every entity's feature row when the held-out months begin
    holdout/<view>.parquet                                 the feature rows of every held-out flight, for replay
    evaluation.json                                        what the models are worth on the held-out flights
    prepared.json                                          what all of this was made from; written last
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.flights import data

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deploy.flights.dataset import Dataset
    from deploy.flights.train import Models
    from services.feature.define.definition import View

FOLDER = "flights"
_MODULES = ("data", "dataset", "evaluate", "graphs", "prepare", "train", "views")
_FEATURE_MODULES = (
    *("define/definition", "define/expression", "define/expression_reader", "define/expression_sql"),
    *("define/expression_tree", "define/rows", "define/schema", "define/windows"),
    *("offline/files", "offline/sql", "offline/sql_events", "offline/sql_frames", "offline/sql_latest"),
    *("offline/sql_places", "offline/sql_sketches", "offline/sql_tiles", "offline/store", "online/materialize"),
)
_LIBRARIES = ("duckdb", "lightgbm", "numpy", "onnx", "scikit-learn", "sqlglot")
# shares of the whole, as measured on two cores
_EVENTS, _FEATURES, _MODELS, _HOLDOUT = 0.04, 0.40, 0.90, 0.96

Progress = Callable[[str, float], None]
"""Told what is being made, and the share of everything that is done: 0 to 1."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """built: False where everything was there already. took_s: of this call. evaluation: see evaluation.json."""

    folder: Path
    built: bool
    took_s: float
    evaluation: dict[str, Any]


def prepare(
    home: Path,
    progress: Progress = lambda _what, _share: None,
    write_events: Callable[[Path], object] = data.write_events,
) -> Prepared:
    """Makes what is missing below `home`. Raises DataError where the package with the data is not installed.

    write_events: puts the events into the folder it is given.
    """
    began = time.monotonic()
    folder, key = home / FOLDER, inputs_hash()
    if built := not _is_current(folder, key):
        _build(folder, key, progress, write_events)
    progress("ready", 1.0)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    return Prepared(folder, built, time.monotonic() - began, evaluation)


def inputs_hash() -> str:
    """SHA-256 over everything that shapes the artefacts: the data's version, the code and the libraries."""
    here, feature = Path(__file__).parent, Path(__file__).parents[2] / "services" / "feature"
    sources = [here / f"{name}.py" for name in _MODULES] + [feature / f"{name}.py" for name in _FEATURE_MODULES]
    digest = hashlib.sha256(f"{data.PACKAGE} {data.package_version()}\n".encode())
    for library in _LIBRARIES:
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    for source in sources:
        digest.update(source.name.encode() + b"\n" + source.read_bytes())
    return digest.hexdigest()


def _is_current(folder: Path, key: str) -> bool:
    """Made from the same inputs, and every file still as large as it was."""
    try:
        stamp = json.loads((folder / "prepared.json").read_text())
        return bool(stamp["key"] == key and stamp["bytes"] == _sizes(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "prepared.json")
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}


def _build(folder: Path, key: str, progress: Progress, write_events: Callable[[Path], object]) -> None:
    """Builds beside what is there, and takes its place at the end: a mesh that runs keeps the files it opened."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    # imported here, as a second run needs none of it
    from deploy.flights import dataset, evaluate, train

    progress("events", 0.0)
    write_events(building / "offline")
    progress("features", _EVENTS)
    made = dataset.build(
        building / "offline", lambda done: progress("features", _EVENTS + done * (_FEATURES - _EVENTS))
    )
    models = train.train(made, key, lambda done: progress("models", _FEATURES + done * (_MODELS - _FEATURES)))
    _write_models(building, models)
    progress("rows to replay", _MODELS)
    _write_rows(building, made)
    progress("evaluation", _HOLDOUT)
    _write_json(building / "evaluation.json", evaluate.evaluate(made, models))
    _write_json(building / "prepared.json", {"key": key, "bytes": _sizes(building)})
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    building.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_models(folder: Path, models: Models) -> None:
    for model in models.tiers.values():
        version = folder / "models" / model.name / "1"
        version.mkdir(parents=True)
        (version / "model.onnx").write_bytes(model.onnx)
    (folder / "fallback").mkdir()
    (folder / "fallback" / f"{models.request.name}.onnx").write_bytes(models.request.onnx)
    _write_json(folder / "fallback" / "flight_delay_prior.json", models.prior)


def _write_rows(folder: Path, made: Dataset) -> None:
    """The base rows, and the test flights' rows; an entity that nothing was known of has none."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet

    from deploy.flights.views import VIEWS

    def put(kind: str, view: View, keys: dict[str, Any], values: NDArray[np.float32]) -> None:
        columns = {name: np.ascontiguousarray(values[:, at]) for at, name in enumerate(view.columns)}
        (folder / kind).mkdir(exist_ok=True)
        path = folder / kind / f"{view.name}.parquet"
        pa.parquet.write_table(pa.table({**keys, **columns}), path, compression="zstd")

    test = made.test()
    for view, base in zip(VIEWS, made.base, strict=True):
        put("base", view, {"entity_id": base.entity_ids}, base.values)
        known = test & made.known[view.name]
        flights = made.flights.filter(known)
        keys = {
            "flight_id": flights["flight_id"],
            "entity_id": flights[view.entity],
            "event_us": flights["predict_at_us"],
        }
        put("holdout", view, keys, made.rows[view.name][known])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> int:
    """Prepares below $TENFOLD_HOME and prints what came of it."""
    home = Path(os.environ.get("TENFOLD_HOME", ".tenfold"))
    home.mkdir(parents=True, exist_ok=True)
    told: list[str] = []

    def tell(what: str, share: float) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{what:<14} {share:4.0%}")
        elif told[-1:] != [what]:
            sys.stderr.write(f"{what}\n")
        told.append(what)

    prepared = prepare(home, tell)
    sys.stderr.write("\n")
    report = asdict(prepared) | {"folder": str(prepared.folder), "took_s": round(prepared.took_s, 1)}
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
