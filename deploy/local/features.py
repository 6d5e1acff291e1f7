"""Where a mesh on this machine has its features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploy.local.commands import mesh_file, told
from deploy.local.folders import RunFolder, home, option
from services.feature.commands.place import Place

if TYPE_CHECKING:
    from deploy.local.state import State


def place_of(chosen: Path | None, stack: str) -> Place:
    """Of the mesh file, else of the stack that runs. Ends the command with a clear line where the file is wrong."""
    from deploy.local import state
    from services.feature.define.definitions import beside
    from services.mesh import meshfile

    with told():
        found = state.read(RunFolder.of(stack, home()))
        running = found if found is not None and found.alive else None
        file = Path(running.mesh_file) if running and chosen is None else mesh_file(chosen)
        mesh = meshfile.load_features(file)
    artefacts = (Path(running.home) if running else home()) / mesh.artefacts
    events = mesh.features.offline
    return Place(
        mesh=mesh.name,
        definitions=beside(file, mesh.features.definitions),
        offline=events if "://" in events else str(artefacts / events),
        store=running.store if running and running.mesh == mesh.name else "",
        why=_why(running, mesh.name, stack),
    )


def _why(running: State | None, mesh: str, stack: str) -> str:
    if running is None:
        return f"no stack {stack!r} is running here; start it with `tenfold up{option(stack)}`"
    return "" if running.mesh == mesh else f"stack {stack!r} runs mesh {running.mesh!r}, not {mesh!r}"
