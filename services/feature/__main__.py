"""The feature service as a process."""

from __future__ import annotations

import sys

from services.feature.check.served import keeping
from services.feature.define.definition import DefinitionError
from services.feature.define.definitions import beside, load
from services.feature.online.store import OnlineStore
from services.feature.online.tables import can_be_followed, open_table
from services.feature.online.tracking import cached
from services.feature.onrequest import RequestViews
from services.feature.service import NAME, FeatureService
from services.feature.settings import FeatureSettings
from services.feature.stream.streams import streaming
from services.mesh.meshfile import MeshFile
from services.mesh.process import main
from services.mesh.serve import Offer, serve
from services.mesh.settings import SettingsError
from services.mesh.telemetry import Tracing
from tenfold.feature.v1 import feature_pb2_grpc


async def run(settings: FeatureSettings, mesh: MeshFile) -> None:
    """Serves until told to stop. Raises SettingsError where the mesh's definitions cannot be used."""
    try:
        definitions = load(beside(settings.mesh_file, mesh.features.definitions)) if mesh.features.definitions else None
    except DefinitionError as error:
        raise SettingsError(str(error)) from error
    tracing = Tracing.to(settings.otlp, "feature", settings.instance)
    try:
        async with open_table(settings.store) as table:
            store = OnlineStore(table, mesh.name)
            # a cluster or DynamoDB does not tell of changes in a way that we follow
            limits = settings.cache_limits() if can_be_followed(settings.store) else None
            async with (
                cached(store, settings.store, store.prefix, limits) as cache,
                streaming(settings, mesh.name, definitions, store) as streams,
                keeping(settings.served, settings.served_share, settings.instance) as served,
            ):
                service = FeatureService(
                    store,
                    settings,
                    tracing,
                    cache=cache,
                    streams=streams,
                    request_views=RequestViews(definitions),
                    served=served,
                )
                offer = Offer(NAME, service, feature_pb2_grpc.add_FeatureServiceServicer_to_server)
                async with service.fresh():
                    await serve(settings, [offer], service.ready)
    finally:
        tracing.close()


if __name__ == "__main__":
    sys.exit(main("services.feature", FeatureSettings, run))
