"""The feature service as a process."""

from __future__ import annotations

import sys

from services.feature.service import NAME, FeatureService
from services.feature.settings import FeatureSettings
from services.feature.store import OnlineStore
from services.feature.valkey import Valkey
from services.mesh.meshfile import MeshFile
from services.mesh.process import main
from services.mesh.serve import Offer, serve
from services.mesh.telemetry import Tracing
from tenfold.feature.v1 import feature_pb2_grpc


async def run(settings: FeatureSettings, mesh: MeshFile) -> None:
    """Serves until told to stop."""
    tracing = Tracing.to(settings.otlp, "feature", settings.instance)
    try:
        async with Valkey(settings.store) as valkey:
            service = FeatureService(OnlineStore(valkey, mesh.name), settings, tracing)
            offer = Offer(NAME, service, feature_pb2_grpc.add_FeatureServiceServicer_to_server)
            async with service.fresh():
                await serve(settings, [offer], service.ready)
    finally:
        tracing.close()


if __name__ == "__main__":
    sys.exit(main("services.feature", FeatureSettings, run))
