"""Where everything of one stack listens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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
