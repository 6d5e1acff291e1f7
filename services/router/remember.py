"""Good answers on their way to fallback, which repeats them when there is nothing better."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from services.mesh.meshfile import MeshFile, Model
from services.mesh.query import Query
from services.resilience.call import Caller, Priority
from services.resilience.errors import CallError
from services.router.callees import Callee
from tenfold.fallback.v1 import fallback_pb2
from tenfold.router.v1 import router_pb2 as pb

REMEMBER: Final = "/tenfold.fallback.v1.FallbackService/Remember"
MOST: Final = 4096  # answers of one call, and so of one interval
TIMEOUT_S: Final = 1.0


class Remember:
    """The newest good answer per model and entity since the last sending; one call per interval.

    sent, dropped: answers that were. Losing one is harmless: an older one is repeated instead.
    """

    def __init__(self, mesh: MeshFile, callee: Callee, every_s: float) -> None:
        self._callee = callee
        self._every_s = every_s
        self._entities = {model.name: entity for model in mesh.models if (entity := _remembered_by(model))}
        self._newest: dict[tuple[str, str], tuple[int, pb.PredictResponse]] = {}
        self.sent = self.dropped = 0

    def note(self, query: Query, answer: pb.PredictResponse) -> None:
        """Keeps a good answer until the next sending, unless one of a later moment is there already."""
        entity_id = query.entities.get(self._entities.get(query.model.name, ""))
        if entity_id is None:
            return
        # a replay of the past speaks of then: its answers must not look fresh now, nor live ones old then
        answered_us = query.request.as_of_us or time.time_ns() // 1000
        key = query.model.name, entity_id
        there = self._newest.get(key)
        if there is None and len(self._newest) >= MOST:
            self.dropped += 1
        elif there is None or there[0] <= answered_us:
            self._newest[key] = answered_us, answer

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.send()

    async def send(self) -> None:
        """Sends what there is. What cannot be sent is dropped: the next answers are on their way already."""
        if not self._newest:
            return
        newest, self._newest = self._newest, {}
        request = fallback_pb2.RememberRequest(
            answers=[
                fallback_pb2.GoodAnswer(
                    model=model,
                    entity_id=entity_id,
                    outputs=answer.outputs,
                    served_by=answer.served_by,
                    answered_us=answered_us,
                )
                for (model, entity_id), (answered_us, answer) in newest.items()
            ]
        )
        caller = Caller(Priority.BACKGROUND, time.monotonic() + TIMEOUT_S, tenant="remember")
        try:
            await self._callee.ask(REMEMBER, request.SerializeToString(), [caller])
        except CallError:
            self.dropped += len(newest)
        else:
            self.sent += len(newest)


def _remembered_by(model: Model) -> str:
    """The entity whose last good answer the model's fallbacks repeat; empty where none does."""
    return next((fallback.entity for fallback in model.fallbacks if fallback.kind == "last_good"), "")
