"""A service as a process of its own: settings from the environment, the mesh file, logs, and an exit status."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from services.mesh import meshfile
from services.mesh.logs import log_to_stderr
from services.mesh.meshfile import MeshFile, MeshFileError
from services.mesh.serve import die_with_parent
from services.mesh.settings import ServiceSettings, SettingsError, from_env

OK, UNUSABLE = 0, 2

S = TypeVar("S", bound=ServiceSettings)
Run = Callable[[S, MeshFile], Coroutine[Any, Any, None]]
"""Serves until told to stop. May raise SettingsError before it serves, for what only it can check."""


def main(service: str, kind: type[S], run: Run[S]) -> int:
    """The exit status: 0 after a clean stop, 2 where settings or mesh file cannot be used; then one line says why.

    service: its package, "services.router", for that line.
    """
    if os.environ.get("TENFOLD_DIE_WITH_PARENT") == "1":
        die_with_parent()
    try:
        settings = from_env(kind)
        mesh = meshfile.load(settings.mesh_file)
        log_to_stderr(settings.instance)
        asyncio.run(run(settings, mesh))
    except (SettingsError, MeshFileError) as error:
        sys.stderr.write(f"{service}: {error}\n")
        return UNUSABLE
    return OK
