"""Event written -> readable, over a store that has on disk what it acknowledged."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.bench.feature_arms import servers
from loadtest.bench.feature_arms.lines import Worker
from loadtest.bench.feature_arms.sizes import Sizes
from loadtest.bench.report import Row, at_most, fact

DEFINITIONS = "loadtest.bench.feature_arms.stream_view"
RATE = 1_000.0  # events per second
_CACHED = 5_000  # streamed rows are not kept there
_WARM_S = 1.0


def rows(client: Worker, folder: Path, sizes: Sizes) -> list[Row]:
    """client: a worker of stream_client."""
    folder.mkdir()
    with contextlib.ExitStack() as until_end:
        store = until_end.enter_context(servers.store(folder, "durable", durable=True))
        client.ask("build", port=store.port, folder=str(folder))
        server = servers.our_server(folder, store.port, "native", _CACHED, DEFINITIONS)
        address, pid = until_end.enter_context(server)
        warm = client.ask("steady", address=address, rate=RATE, seconds=_WARM_S, first=1, seed=0)
        sent = int(warm["sent"])
        found = client.ask("steady", address=address, rate=RATE, seconds=sizes.stream_s, first=sent + 1, seed=1)
        sent += int(found["sent"])
        pids = {"service": pid, "store": store.pid}
        before = {name: servers.cpu_s(one) for name, one in pids.items()}
        burst = client.ask("burst", address=address, events=sizes.burst, first=sent + 1, seed=2, before=sent)
        spent = {name: servers.cpu_s(one) - before[name] for name, one in pids.items()}
    return [*_steady(found), *_burst(burst, spent, sent, sizes.burst)]


def _steady(found: Mapping[str, Any]) -> list[Row]:
    made = [
        fact("events written, steady", found["sent"] / found["seconds"], "events/s"),
        at_most("watched events never readable", found["unseen"], 0, "events"),
    ]
    for begin in ("acknowledged", "sent"):
        taken_ms = np.array(found[f"from_{begin}_s"]) * 1e3
        made.append(fact(f"event {begin} -> readable, P50", _quantile(taken_ms, 0.5), "ms"))
        made.append(at_most(f"event {begin} -> readable, P99", _quantile(taken_ms, 0.99), 1_000, "ms"))
    read_ms = np.array(found["read_s"]) * 1e3
    return [*made, fact("GetFeatures of streamed rows meanwhile, P99", _quantile(read_ms, 0.99), "ms")]


def _burst(found: Mapping[str, float], spent_s: Mapping[str, float], before: int, events: int) -> list[Row]:
    return [
        fact("events acknowledged, flat out", events / found["acknowledged_s"], "events/s"),
        fact("events applied, flat out", events / found["counted_s"], "events/s"),
        *(fact(f"CPU per event, flat out, {name}", cpu_s * 1e6 / events, "us") for name, cpu_s in spent_s.items()),
        at_most("events lost or counted twice", abs(before + events - found["counted"]), 0, f"of {before + events}"),
    ]


def _quantile(values: NDArray[np.float64], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else float("nan")
