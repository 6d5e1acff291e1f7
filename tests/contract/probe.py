"""A service whose methods do what tests of channels and servers need: bytes in, bytes out.

As a program it serves until SIGTERM: python -m tests.contract.probe TRANSPORT ADDRESS
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from services.mesh.serve import Offer, Server, serve, unary
from services.mesh.settings import ServiceSettings
from services.resilience.call import Call
from services.resilience.errors import (
    BadInput,
    CallError,
    DeadlineExceeded,
    NotFound,
    Reason,
    Refused,
    Unavailable,
    Violation,
)

NAME = "tenfold.test.Probe"
ECHO, TELL, MAKE, FAIL, CRASH, WAIT, PAUSE = (
    f"/{NAME}/{method}" for method in ("Echo", "Tell", "Make", "Fail", "Crash", "Wait", "Pause")
)

ERRORS: dict[str, Callable[[], CallError]] = {
    "refused": lambda: Refused(Reason.QUEUE_FULL, "voll, für jetzt: 100 %", retry_after_s=0.25),
    "late": lambda: DeadlineExceeded("it could not have held"),
    "bad": lambda: BadInput(Violation("model", "must be set"), Violation("inputs.x", "must be a number, got 'a'")),
    "unknown": lambda: NotFound("no model 'x'"),
    "down": lambda: Unavailable("the store is away", Reason.FEATURES_UNAVAILABLE),
}


class Probe:
    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.running = 0
        self.most_running = 0

    @unary(f"{NAME}/Echo")
    async def Echo(self, call: Call[bytes]) -> bytes:
        return call.request

    @unary(f"{NAME}/Tell")
    async def Tell(self, call: Call[bytes]) -> bytes:
        """The caller, as JSON."""
        caller = call.caller
        told = {
            "priority": caller.priority.label,
            "tenant": caller.tenant,
            "cohort": caller.cohort,
            "traceparent": caller.traceparent,
            "remaining_s": caller.remaining_s(asyncio.get_running_loop().time()),
        }
        return json.dumps(told).encode()

    @unary(f"{NAME}/Make")
    async def Make(self, call: Call[bytes]) -> bytes:
        """As many bytes as asked for."""
        return b"m" * int(call.request)

    @unary(f"{NAME}/Fail")
    async def Fail(self, call: Call[bytes]) -> bytes:
        raise ERRORS[call.request.decode()]()

    @unary(f"{NAME}/Crash")
    async def Crash(self, call: Call[bytes]) -> bytes:
        raise RuntimeError("a mistake in a handler")

    @unary(f"{NAME}/Wait")
    async def Wait(self, call: Call[bytes]) -> bytes:
        """Until it is cancelled."""
        self.started.set()
        try:
            return await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    @unary(f"{NAME}/Pause")
    async def Pause(self, call: Call[bytes]) -> bytes:
        """Answers with its request after that many seconds."""
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(float(call.request))
            return call.request
        finally:
            self.running -= 1


def add_probe(probe: Probe, server: Any) -> None:
    """As generated code adds a servicer."""
    names = [method.rpartition("/")[2] for method in (ECHO, TELL, MAKE, FAIL, CRASH, WAIT, PAUSE)]
    handlers = {name: grpc.unary_unary_rpc_method_handler(getattr(probe, name)) for name in names}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    server.add_registered_method_handlers(NAME, handlers)


def offer(probe: Probe) -> Offer:
    return Offer(NAME, probe, add_probe)


@contextlib.asynccontextmanager
async def serving(transport: str, listen: str) -> AsyncIterator[tuple[str, Probe]]:
    """A server that is ready: its address, and what it serves."""
    probe = Probe()
    server = Server(listen, [offer(probe)], transport)
    port = await server.start()
    await server.ready()
    try:
        yield (listen if listen.startswith("unix:") else f"127.0.0.1:{port}"), probe
    finally:
        await server.stop(lame_duck_s=0.0, grace_s=0.1)


async def nothing_to_prepare() -> None: ...


async def main(transport: str, listen: str, make_ready: Callable[[], Awaitable[None]] = nothing_to_prepare) -> None:
    settings = ServiceSettings(Path(os.devnull), listen, "probe", transport=transport, lame_duck_s=0.2, grace_s=5.0)
    await serve(settings, [offer(Probe())], make_ready)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
