"""Environment -> frozen dataclass, once, at the start of a process.

Every service reads its addresses from the environment and its behaviour from the mesh file. A field `listen` of a
settings class is read from TENFOLD_LISTEN; a field without a default must be set.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")

PREFIX = "TENFOLD_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class SettingsError(ValueError):
    """A variable that is missing or has a value that cannot be used."""


def from_env(kind: type[T], environ: Mapping[str, str] | None = None) -> T:
    """An instance of the frozen dataclass `kind`.

    Raises SettingsError naming the variable, its value and what is allowed.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = PREFIX + field.name.upper()
        text = environ.get(name)
        if text is None:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise SettingsError(f"{name} must be set")
            continue
        values[field.name] = _convert(name, text, hints[field.name])
    try:
        return kind(**values)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _convert(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        lowered = text.strip().lower()
        if lowered not in _TRUE + _FALSE:
            raise SettingsError(f"{name} must be one of {', '.join(_TRUE + _FALSE)}, got {text!r}")
        return lowered in _TRUE
    if kind in (int, float, str, Path):
        try:
            return kind(text)
        except ValueError:
            raise SettingsError(f"{name} must be {kind.__name__}, got {text!r}") from None
    raise TypeError(f"{name}: settings hold int, float, bool, str or Path, not {kind}")


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What every service needs to know of where it runs.

    mesh_file: the mesh's description, tenfold.toml.
    listen: where to serve: "host:port" or "unix:/path".
    instance: this replica's name, for example "router-0".
    egress: where calls to other services go: the gateway's egress listener; empty where the service makes none.
    otlp: where sampled spans go, an OTLP gRPC address; empty to keep none.
    transport: "grpcio" or "native", see services/mesh/serve.py.
    channel: "h2" or "grpcio", how calls leave, see services/mesh/channels.py.
    lame_duck_s: how long a stopping server says NOT_SERVING before it refuses, so that balancers look away.
    grace_s: how long it then waits for calls in flight.
    """

    mesh_file: Path
    listen: str
    instance: str
    egress: str = ""
    otlp: str = ""
    transport: str = "grpcio"
    channel: str = "h2"
    lame_duck_s: float = 0.3
    grace_s: float = 5.0

    def __post_init__(self) -> None:
        if self.transport not in ("grpcio", "native"):
            raise ValueError(f"{PREFIX}TRANSPORT must be grpcio or native, got {self.transport!r}")
        if self.channel not in ("h2", "grpcio"):
            raise ValueError(f"{PREFIX}CHANNEL must be h2 or grpcio, got {self.channel!r}")
        for name in ("lame_duck_s", "grace_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{PREFIX}{name.upper()} must be at least 0 s, got {getattr(self, name)}")
