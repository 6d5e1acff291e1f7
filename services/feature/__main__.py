"""The feature service as a process."""

from __future__ import annotations

import asyncio
import os
import sys

from services.feature.service import NAME, FeatureService
from services.feature.settings import FeatureSettings
from services.feature.store import OnlineStore
from services.feature.valkey import Valkey
from services.mesh import meshfile
from services.mesh.logs import log_to_stderr
from services.mesh.serve import Offer, die_with_parent, serve
from services.mesh.settings import SettingsError, from_env
from services.mesh.telemetry import Tracing
from tenfold.feature.v1 import feature_pb2_grpc


async def run(settings: FeatureSettings, mesh: str) -> None:
    """Serves until told to stop. mesh: its name, which is part of every key."""
    tracing = Tracing.to(settings.otlp, "feature", settings.instance)
    try:
        async with Valkey(settings.store) as valkey:
            service = FeatureService(OnlineStore(valkey, mesh), settings, tracing)
            offer = Offer(NAME, service, feature_pb2_grpc.add_FeatureServiceServicer_to_server)
            async with service.fresh():
                await serve(settings, [offer], service.ready)
    finally:
        tracing.close()


def main() -> int:
    try:
        settings = from_env(FeatureSettings)
        mesh = meshfile.load(settings.mesh_file)
    except (SettingsError, meshfile.MeshFileError) as error:
        sys.stderr.write(f"services.feature: {error}\n")
        return 2
    log_to_stderr(settings.instance)
    if os.environ.get("TENFOLD_DIE_WITH_PARENT") == "1":
        die_with_parent()
    asyncio.run(run(settings, mesh.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
