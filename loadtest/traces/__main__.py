"""python -m loadtest.traces: the OTLP sink of a stack on one machine."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

from loadtest.traces.sink import Keep, TraceSink
from loadtest.traces.store import TraceStore
from services.mesh.logs import log_to_stderr
from services.mesh.serve import Server, die_with_parent, stop_requested
from services.mesh.settings import SettingsError, from_env

log = logging.getLogger("loadtest.traces")


@dataclass(frozen=True, slots=True)
class Settings:
    """Read from TENFOLD_* variables.

    listen: where spans arrive by OTLP gRPC, "host:port" or "unix:/path".
    traces: the SQLite file they are kept in.
    traces_max_spans, traces_max_age_s: the oldest spans leave beyond these.
    """

    listen: str
    traces: Path
    instance: str = "traces-0"
    traces_max_spans: int = 200_000
    traces_max_age_s: float = 86_400.0
    die_with_parent: bool = False


async def run(settings: Settings, keep: Keep) -> None:
    with TraceStore(settings.traces, writable=True) as store:
        sink = TraceSink(store, keep)
        server = Server(settings.listen, [sink.offer()])
        await server.start()
        await server.ready()
        log.info("serving", extra={"listen": settings.listen, "traces": settings.traces})
        await stop_requested()
        await server.stop(lame_duck_s=0, grace_s=1)
        await sink.close()
        log.info("stopped", extra={"received": sink.received, "dropped": sink.dropped})


def main() -> None:
    try:
        settings = from_env(Settings)
        keep = Keep(max_spans=settings.traces_max_spans, max_age_s=settings.traces_max_age_s)
    except (SettingsError, ValueError) as error:
        sys.stderr.write(f"loadtest.traces: {error}\n")
        sys.exit(2)
    log_to_stderr(settings.instance)
    if settings.die_with_parent:
        die_with_parent()
    try:
        asyncio.run(run(settings, keep))
    except sqlite3.Error as error:
        sys.stderr.write(f"loadtest.traces: {settings.traces}: {error}\n")
        sys.exit(2)


main()
