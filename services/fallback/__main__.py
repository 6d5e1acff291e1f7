"""Serves fallback answers: `python -m services.fallback`."""

from __future__ import annotations

import asyncio
import os
import sys

from services.fallback.service import FALLBACK_NAME, ROUTER_NAME, Fallbacks, FallbackServicer
from services.fallback.settings import FallbackSettings
from services.mesh import meshfile
from services.mesh.logs import log_to_stderr
from services.mesh.serve import Offer, die_with_parent, serve
from services.mesh.settings import SettingsError, from_env
from services.mesh.telemetry import Tracing
from tenfold.fallback.v1.fallback_pb2_grpc import add_FallbackServiceServicer_to_server
from tenfold.router.v1.router_pb2_grpc import add_RouterServiceServicer_to_server


async def run(settings: FallbackSettings, mesh: meshfile.MeshFile) -> None:
    """Serves until told to stop."""
    tracing = Tracing.to(settings.otlp, "fallback", settings.instance)
    servicer = FallbackServicer(Fallbacks(mesh, settings), tracing, settings.predict_batch_max)
    offers = [
        Offer(ROUTER_NAME, servicer, add_RouterServiceServicer_to_server),
        Offer(FALLBACK_NAME, servicer, add_FallbackServiceServicer_to_server),
    ]

    async def ready() -> None:
        """Everything was loaded before the server listened."""

    try:
        await serve(settings, offers, ready)
    finally:
        tracing.close()


def main() -> int:
    try:
        settings = from_env(FallbackSettings)
        mesh = meshfile.load(settings.mesh_file)
    except (SettingsError, meshfile.MeshFileError) as error:
        sys.stderr.write(f"services.fallback: {error}\n")
        return 2
    log_to_stderr(settings.instance)
    if os.environ.get("TENFOLD_DIE_WITH_PARENT") == "1":
        die_with_parent()
    asyncio.run(run(settings, mesh))
    return 0


if __name__ == "__main__":
    sys.exit(main())
