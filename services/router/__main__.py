"""Serves the router: `python -m services.router`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

from services.mesh import meshfile
from services.mesh.channels import open_channel
from services.mesh.logs import log_to_stderr
from services.mesh.serve import Offer, die_with_parent, serve
from services.mesh.settings import SettingsError, from_env
from services.mesh.telemetry import Tracing
from services.router.callees import Network
from services.router.predict import Predictor
from services.router.service import NAME, RouterServicer
from services.router.settings import RouterSettings
from tenfold.router.v1.router_pb2_grpc import add_RouterServiceServicer_to_server


async def run(settings: RouterSettings, mesh: meshfile.MeshFile) -> None:
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


def main() -> int:
    try:
        settings = from_env(RouterSettings)
        mesh = meshfile.load(settings.mesh_file)
    except (SettingsError, meshfile.MeshFileError) as error:
        sys.stderr.write(f"services.router: {error}\n")
        return 2
    log_to_stderr(settings.instance)
    if os.environ.get("TENFOLD_DIE_WITH_PARENT") == "1":
        die_with_parent()
    asyncio.run(run(settings, mesh))
    return 0


if __name__ == "__main__":
    sys.exit(main())
