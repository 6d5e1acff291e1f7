"""`python -m gateway render` writes Envoy's configuration; `validate` asks Envoy whether it would start with it.

Status 2 and one line on standard error where the mesh file, the topology or the configuration is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gateway import descriptors, envoy, topology
from gateway.addresses import Config
from gateway.config import ConfigError, bootstrap
from services.mesh import meshfile


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        config = render(options.mesh, options.topology)
        if options.what == "validate":
            _validate(config)
        elif options.out:
            options.out.write_text(_text(config), encoding="utf-8")
        else:
            sys.stdout.write(_text(config))
    except (
        ConfigError,
        OSError,
        descriptors.UnknownField,
        envoy.EnvoyError,
        meshfile.MeshFileError,
        topology.TopologyError,
    ) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def render(mesh: Path, where: Path) -> Config:
    """The checked bootstrap configuration for a mesh file and a topology file."""
    config = bootstrap(meshfile.load(mesh), topology.load(where))
    descriptors.check(config, envoy.binary())
    return config


def _validate(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "envoy.json"
        path.write_text(_text(config), encoding="utf-8")
        envoy.validate(path)
    sys.stdout.write("Envoy accepts the configuration\n")


def _text(config: Config) -> str:
    return json.dumps(config, indent=1) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gateway", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name, does in (("render", "write the configuration"), ("validate", "ask Envoy whether it would start with it")):
        command = commands.add_parser(name, help=does)
        command.add_argument("--mesh", type=Path, required=True, help="the mesh's description, tenfold.toml")
        command.add_argument("--topology", type=Path, required=True, help="where everything listens, a JSON file")
        if name == "render":
            command.add_argument("--out", type=Path, help="the file to write; standard output without it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
