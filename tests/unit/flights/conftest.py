from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from deploy.flights import data


@pytest.fixture(scope="session")
def all_events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of every event there is."""
    folder = tmp_path_factory.mktemp("events")
    data.write_events(folder)
    return folder


@pytest.fixture(scope="session")
def write_some_events(all_events: Path) -> Callable[[Path], None]:
    """Writes the flights from LaGuardia in the first days of each month, and the weather there: about 3,500."""

    def write(folder: Path) -> None:
        for name, where in (("flights", "origin = 'LGA' AND sched_hour < 15"), ("weather", "origin = 'LGA'")):
            (folder / name).mkdir(parents=True)
            for file in sorted((all_events / name).glob("*.parquet")):
                first = f"(SELECT min(departs_us) + 86400000000 FROM '{file}')" if name == "flights" else ""
                early = f" AND departs_us < {first}" if first else ""
                rows = f"SELECT * FROM '{file}' WHERE {where}{early} ORDER BY 1"
                duckdb.sql(f"COPY ({rows}) TO '{folder / name / file.name}' (FORMAT parquet)")

    return write
