"""Serves the router: `python -m services.router`."""

from __future__ import annotations

import asyncio
import contextlib
import sys

from services.mesh.channels import open_channel
from services.mesh.meshfile import MeshFile
from services.mesh.process import main
from services.mesh.serve import Offer, serve
from services.mesh.telemetry import Tracing
from services.router.callees import Network
from services.router.predict import Predictor
from services.router.service import NAME, RouterServicer
from services.router.settings import RouterSettings
from tenfold.router.v1.router_pb2_grpc import add_RouterServiceServicer_to_server


async def run(settings: RouterSettings, mesh: MeshFile) -> None:
    """Serves until told to stop."""
    channel = open_channel(settings.egress, settings.channel)
    tracing = Tracing.to(settings.otlp, "router", settings.instance)
    predictor = Predictor(mesh, settings, Network(channel, tracing, settings.callee_timeout_s, settings.breaker))
    servicer = RouterServicer(predictor, tracing, settings.predict_batch_max)

    async def ready() -> None:
        # a router that knows no model yet can only degrade; one that cannot learn them still does that
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.ready_wait_s):
                await predictor.plans.complete.wait()

    try:
        async with asyncio.TaskGroup() as group:  # a router that can no longer learn must not go on serving
            upkeep = group.create_task(predictor.run())
            await serve(settings, [Offer(NAME, servicer, add_RouterServiceServicer_to_server)], ready)
            upkeep.cancel()
    finally:
        await channel.close()
        tracing.close()


if __name__ == "__main__":
    sys.exit(main("services.router", RouterSettings, run))
