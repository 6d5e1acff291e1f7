"""What features cost, beside Feast and beside what the machine can do, and whether they are right.

Reads, memory, materialising, training sets; the contract, every path and engine; events until they are readable.
Every arm has the same data, a Valkey of its own and the same turns, one after the other, and its values are checked.
Feast and the limits run in environments of their own, made below $TENFOLD_HOME/bench at the first run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.feature_arms import agreement, environments, freshness, offline, online, servers
from loadtest.bench.feature_arms.data import prepared
from loadtest.bench.feature_arms.lines import Failed, Worker
from loadtest.bench.feature_arms.servers import Store
from loadtest.bench.feature_arms.sizes import FULL, QUICK, VOLUMES, Sizes
from loadtest.bench.report import Row, emit

_ARMS = "loadtest.bench.feature_arms"


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run needs.

    data: files that every arm reads. scratch: logs, and Feast's repositories. feast: its interpreter, None without it.
    """

    sizes: Sizes
    data: Path
    scratch: Path
    limits: Path
    feast: Path | None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.features", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and one round")
    parser.add_argument("--json", action="store_true", help="accepted for scripts; the last line is JSON anyway")
    parser.add_argument("--without", choices=["feast"], action="append", default=[], help="leave the peer out")
    parser.add_argument("--only", choices=list(_SECTIONS), action="append", help="these parts; may be repeated")
    options = parser.parse_args()
    home = Path(os.environ.get("TENFOLD_HOME", ".tenfold")).absolute() / "bench"
    scratch = home / "features" / "run"
    try:
        made = _measured(options, home, scratch)
    except Failed as failed:
        raise SystemExit(str(failed)) from None  # which says where a log is
    except KeyboardInterrupt:
        shutil.rmtree(scratch, ignore_errors=True)
        raise SystemExit("interrupted") from None
    shutil.rmtree(scratch)
    emit("features", made)


def _measured(options: argparse.Namespace, home: Path, scratch: Path) -> list[Row]:
    shutil.rmtree(scratch, ignore_errors=True)
    temporary = scratch / "tmp"
    temporary.mkdir(parents=True)
    os.environ["TMPDIR"] = str(temporary)  # what a process leaves there, if it is killed, goes with the rest
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sizes = QUICK if options.quick else FULL
    setting = Setting(
        sizes=sizes,
        data=prepared(home / "features", sizes),
        scratch=scratch,
        limits=environments.python_of("limits", home),
        feast=None if "feast" in options.without else environments.python_of("feast", home),
    )
    made: list[Row] = []
    for name in options.only or _SECTIONS:
        began = time.monotonic()
        made += _SECTIONS[name](setting)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return made


def reads(setting: Setting) -> list[Row]:
    """Materialising first: it fills the stores that are read."""
    with ExitStack() as until_end:
        ours = _own_worker(until_end, setting, "ours")
        limits = _worker(until_end, setting, "limits", setting.limits)
        arms = {offline.OURS: ours, offline.PACKED: limits}
        if setting.feast:
            arms[offline.FEAST] = _worker(until_end, setting, "peer", setting.feast)
        stores = {
            arm: until_end.enter_context(servers.store(setting.scratch, str(number))) for number, arm in enumerate(arms)
        }
        if setting.feast:
            _apply(setting, arms[offline.FEAST], "1x", stores[offline.FEAST].port)
        made = offline.materializing(arms, stores, setting.data, setting.sizes)
        started = _servers(until_end, setting, stores)
        return made + online.rows(started, setting.data, setting.sizes)


def joins(setting: Setting) -> list[Row]:
    with _offline_workers(setting) as (ours, limits, feast):
        return offline.joining(ours, limits, feast, setting.data, setting.sizes)


def correctness(setting: Setting) -> list[Row]:
    with _offline_workers(setting) as (ours, _, feast):
        return offline.correctness(ours, feast, setting.data, setting.scratch)


def agreeing(setting: Setting) -> list[Row]:
    with ExitStack() as until_end:
        return agreement.rows(_own_worker(until_end, setting, "flights"), setting.scratch, setting.sizes)


def fresh(setting: Setting) -> list[Row]:
    with ExitStack() as until_end:
        client = _own_worker(until_end, setting, "stream_client")
        return freshness.rows(client, setting.scratch / "stream", setting.sizes)


_SECTIONS = {"reads": reads, "joins": joins, "correctness": correctness, "agreement": agreeing, "freshness": fresh}


@contextlib.contextmanager
def _offline_workers(setting: Setting) -> Iterator[tuple[Worker, Worker, Worker | None]]:
    """Ours, the limits, and Feast with a repository per engine and volume; new processes, so nothing is warm."""
    with ExitStack() as until_end:
        feast = _worker(until_end, setting, "peer", setting.feast) if setting.feast else None
        for volume in VOLUMES if feast else ():
            _apply(setting, feast, volume, port=0)
        yield (
            _own_worker(until_end, setting, "ours"),
            _worker(until_end, setting, "limits", setting.limits),
            feast,
        )


def _worker(until_end: ExitStack, setting: Setting, module: str, python: Path) -> Worker:
    return until_end.enter_context(Worker(python, f"{_ARMS}.{module}", setting.scratch / f"worker-{module}.log"))


def _own_worker(until_end: ExitStack, setting: Setting, module: str) -> Worker:
    return _worker(until_end, setting, module, Path(sys.executable))


def _repository(setting: Setting, name: str) -> Path:
    return setting.scratch / name


def _apply(setting: Setting, feast: Worker | None, volume: str, port: int) -> None:
    assert feast is not None
    for engine in offline.FEAST_ENGINES.values():
        name = offline.store_name(engine, volume)
        feast.ask(
            "apply",
            name=name,
            repository=str(_repository(setting, name)),
            folder=str(setting.data),
            volume=volume,
            engine=engine,
            port=port,
        )


def _servers(until_end: ExitStack, setting: Setting, stores: Mapping[str, Store]) -> list[online.Server]:
    """All of them at once, each in front of its own store."""
    client = _own_worker(until_end, setting, "client")
    started = []
    if setting.feast:
        repository = _repository(setting, offline.store_name("duckdb", "1x"))
        own_client = _worker(until_end, setting, "client", setting.feast)
        server = servers.feast_server(setting.feast, setting.scratch, repository)
        started.append(online.Server(online.FEAST, *until_end.enter_context(server), own_client))
    floor = servers.floor_server(setting.limits, setting.scratch, stores[offline.PACKED].port)
    started.append(online.Server(online.FLOOR, *until_end.enter_context(floor), client))
    for arm, transport in ((online.OURS, "native"), (online.OURS_GRPCIO, "grpcio")):
        server = servers.our_server(setting.scratch, stores[offline.OURS].port, transport, setting.sizes.entities)
        started.append(online.Server(arm, *until_end.enter_context(server), client))
    return started


if __name__ == "__main__":
    main()
