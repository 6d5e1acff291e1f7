"""Checking a mesh file without starting anything."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from deploy.local import plan
from deploy.local.ports import Ports
from deploy.local.state import StackError
from services.mesh import meshfile
from services.mesh.meshfile import MeshFile


def check(file: Path) -> str:
    """What the file describes, in one line. Raises MeshFileError, or StackError where the gateway would refuse it."""
    from gateway import config, envoy

    mesh = meshfile.load(file)
    with tempfile.TemporaryDirectory(prefix="tf-") as folder, Ports() as ports:
        topology = plan.addresses(mesh, Path(folder), ports, port=None, tcp=False)
        generated = Path(folder) / "envoy.json"
        try:
            generated.write_text(json.dumps(config.bootstrap(mesh, topology)))
            envoy.validate(generated)
        except (config.ConfigError, envoy.EnvoyError) as error:
            raise StackError(f"the gateway cannot be configured: {error}") from error
    return f"{file}: mesh {mesh.name!r} is valid: {_summary(mesh)}"


def _summary(mesh: MeshFile) -> str:
    tiers = sum(len(model.tiers) for model in mesh.models)
    processes = sum(mesh.service(name).replicas for name in meshfile.SERVICES)
    return f"{len(mesh.models)} model(s) in {tiers} tier(s), {processes} service processes"
