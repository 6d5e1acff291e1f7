"""A constant trickle of live traffic to the fallback service, off the critical path.

A fallback that is only called when all else failed is not known to work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from services.mesh import attributes
from services.resilience.call import Caller, Priority
from services.resilience.errors import CallError, Reason
from services.router.callees import Callee
from services.router.standby import PREDICT
from tenfold.router.v1 import router_pb2 as pb

log = logging.getLogger(__name__)

AT_ONCE: Final = 8
TIMEOUT_S: Final = 1.0


class Shadow:
    """Sends one request in `every` to fallback and throws the answer away.

    sent, answered, failed, skipped: how many were; skipped are those that found AT_ONCE already under way.
    """

    def __init__(self, callee: Callee, every: int) -> None:
        """every: 0 sends none."""
        self._callee = callee
        self._every = every
        self._seen = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._works = True
        self.sent = self.answered = self.failed = self.skipped = 0

    def see(self, request: pb.PredictRequest) -> None:
        """Counts a live request; sends it if its turn has come."""
        self._seen += 1
        if not self._every or self._seen % self._every:
            return
        if len(self._tasks) >= AT_ONCE:
            self.skipped += 1
            return
        task = asyncio.get_running_loop().create_task(self._send(request.SerializeToString()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self, request: bytes) -> None:
        caller = Caller(Priority.BACKGROUND, time.monotonic() + TIMEOUT_S, tenant="shadow")
        self.sent += 1
        try:
            await self._callee.ask(PREDICT, request, [caller], (attributes.DEGRADED_REASON, Reason.UNSPECIFIED.label))
        except CallError as error:
            self.failed += 1
            if self._works:
                log.warning("fallback does not work", extra={"error": str(error)})
            self._works = False
        else:
            self.answered += 1
            if not self._works:
                log.info("fallback works again")
            self._works = True
