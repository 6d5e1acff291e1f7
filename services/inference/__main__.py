"""The inference service as a process."""

from __future__ import annotations

import asyncio
import sys

from services.inference.onnx import OnnxRuntime
from services.inference.repository import Repository
from services.inference.service import InferenceService, offer
from services.inference.settings import InferenceSettings
from services.mesh.meshfile import MeshFile
from services.mesh.process import main
from services.mesh.serve import serve
from services.mesh.settings import SettingsError
from services.mesh.telemetry import Tracing


async def run(settings: InferenceSettings, _mesh: MeshFile) -> None:
    """Serves until told to stop. Raises SettingsError where no provider can be used as the settings say."""
    try:
        runtime = OnnxRuntime(settings.provider_list, settings.options)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    repository = Repository(settings.models, runtime.load, settings.limits, settings.pinned)
    tracing = Tracing.to(settings.otlp, "inference", settings.instance)
    loaded = asyncio.Event()

    async def make_ready() -> None:
        await repository.refresh()
        loaded.set()
        await repository.any_ready()

    async def watch() -> None:
        await loaded.wait()
        await repository.watch(settings.poll_s)

    watching = asyncio.create_task(watch())
    try:
        await serve(settings, [offer(InferenceService(repository, tracing))], make_ready)
    finally:
        watching.cancel()
        await repository.close()
        tracing.close()


if __name__ == "__main__":
    sys.exit(main("services.inference", InferenceSettings, run))
