"""Serves fallback answers: `python -m services.fallback`."""

from __future__ import annotations

import sys

from services.fallback.service import FALLBACK_NAME, ROUTER_NAME, Fallbacks, FallbackServicer
from services.fallback.settings import FallbackSettings
from services.mesh.meshfile import MeshFile
from services.mesh.process import main
from services.mesh.serve import Offer, serve
from services.mesh.telemetry import Tracing
from tenfold.fallback.v1.fallback_pb2_grpc import add_FallbackServiceServicer_to_server
from tenfold.router.v1.router_pb2_grpc import add_RouterServiceServicer_to_server


async def run(settings: FallbackSettings, mesh: MeshFile) -> None:
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


if __name__ == "__main__":
    sys.exit(main("services.fallback", FallbackSettings, run))
