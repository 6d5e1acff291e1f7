"""A channel that answers from a table, and what every test of the router needs beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from services.mesh.context import Metadata
from services.mesh.errors import callee_error
from services.mesh.telemetry import NO_TRACING
from services.resilience.breaker import Rules
from services.router.callees import Callee, Network

Answer = Callable[[bytes], bytes]


class Ticks:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeChannel:
    """Obeys services.mesh.channels.Channel. answers: method -> what it answers, or the status it ends with."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer | grpc.StatusCode] = {}
        self.asked: list[tuple[str, bytes, float, dict[str, str]]] = []
        self.held: asyncio.Event | None = None

    async def unary(self, method: str, request: bytes, *, timeout_s: float, metadata: Metadata = ()) -> bytes:
        self.asked.append((method, request, timeout_s, dict(metadata)))
        if self.held is not None:
            await self.held.wait()
        answer = self.answers.get(method, grpc.StatusCode.UNIMPLEMENTED)
        if isinstance(answer, grpc.StatusCode):
            raise callee_error(method, answer, "as told", ())
        return answer(request)

    async def close(self) -> None:
        pass


def network(channel: FakeChannel, clock: Callable[[], float] | None = None, timeout_s: float = 1.0) -> Network:
    rules = Rules(open_s=1.0)
    return (
        Network(channel, NO_TRACING, timeout_s, rules)
        if clock is None
        else Network(channel, NO_TRACING, timeout_s, rules, clock)
    )


def callee(channel: FakeChannel, clock: Callable[[], float] | None = None, name: str = "callee") -> Callee:
    return Callee(name, network(channel, clock))
