"""The inference service as a process."""

from __future__ import annotations

import asyncio
import os
import sys

from services.inference.onnx import OnnxRuntime
from services.inference.repository import Repository
from services.inference.service import InferenceService, offer
from services.inference.settings import InferenceSettings
from services.mesh.logs import log_to_stderr
from services.mesh.meshfile import MeshFileError, load
from services.mesh.serve import die_with_parent, serve
from services.mesh.settings import SettingsError, from_env
from services.mesh.telemetry import Tracing


async def run(settings: InferenceSettings, runtime: OnnxRuntime) -> None:
    """Serves until told to stop."""
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


def main() -> int:
    """0 after a clean stop, 2 where the settings cannot be used."""
    if os.environ.get("TENFOLD_DIE_WITH_PARENT") == "1":
        die_with_parent()
    try:
        settings = from_env(InferenceSettings)
        load(settings.mesh_file)
        log_to_stderr(settings.instance)
        runtime = OnnxRuntime(settings.provider_list, settings.options)
    except (SettingsError, MeshFileError, ValueError) as error:
        sys.stderr.write(f"inference: {error}\n")
        return 2
    asyncio.run(run(settings, runtime))
    return 0


if __name__ == "__main__":
    sys.exit(main())
