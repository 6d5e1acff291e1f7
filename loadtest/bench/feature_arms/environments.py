"""Python environments that the benchmark needs and tenfold must not depend on, made where they are absent."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

_MADE = "made-from.txt"


def python_of(name: str, home: Path) -> Path:
    """The interpreter of the environment of `requirements-<name>.txt`, kept below `home`."""
    requirements = Path(__file__).with_name(f"requirements-{name}.txt")
    folder = home / name
    python = folder / "bin" / "python"
    made = folder / _MADE
    if not made.is_file() or made.read_bytes() != requirements.read_bytes():
        _uv("venv", "--clear", "--python", sys.executable, str(folder))
        _uv("pip", "install", "--python", str(python), "--requirement", str(requirements))
        made.write_bytes(requirements.read_bytes())
    return python.absolute()


def _uv(*arguments: str) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise SystemExit("uv must be installed: it makes the environments of Feast and of the limits")
    done = subprocess.run([uv, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"uv {' '.join(arguments)}: exit status {done.returncode}\n{done.stderr}")
