"""Where everything of one stack listens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from services.mesh.meshfile import SERVICES


class TopologyError(ValueError):
    """The topology cannot be used; the message names the field, its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Addresses are "host:port" or "unix:/path"; host may be a name where containers resolve it.

    ingress: where clients call. egress: where services call each other. admin: Envoy's own page, loopback only.
    otlp: where spans go, empty for nowhere.
    replicas: service name -> address of each replica, for every service of `meshfile.SERVICES`.
    """

    ingress: str
    egress: str
    admin: str
    replicas: Mapping[str, Sequence[str]]
    otlp: str = ""

    def __post_init__(self) -> None:
        if wrong := sorted(set(self.replicas) ^ set(SERVICES)):
            raise TopologyError(f"replicas must name exactly {', '.join(SERVICES)}; {', '.join(wrong)} is off")
        for service, addresses in self.replicas.items():
            if not addresses:
                raise TopologyError(f"replicas.{service} must have at least 1 address, got 0")


def load(path: Path) -> Topology:
    """The topology in the JSON file at `path`. Raises TopologyError naming the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Topology)
    except OSError as error:
        raise TopologyError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, TopologyError) as error:
        raise TopologyError(f"{path}: {error}") from error


def save(topology: Topology, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(topology), indent=2) + b"\n")
