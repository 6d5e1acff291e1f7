"""Where a stack on one machine keeps its things.

$TENFOLD_HOME/<artefacts>/    models, priors, offline data: shared by stacks
$TENFOLD_HOME/run/<stack>/    state.json while it runs; logs, traces, the online store and generated configuration
/tmp/tf-xxxxxxxx/             its Unix sockets, whose paths must be short; gone when it stops
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_STACK = "default"
_STACK = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")
_SOCKETS_PREFIX = "tf-"


def home() -> Path:
    """TENFOLD_HOME, or .tenfold in the working directory."""
    return Path(os.environ.get("TENFOLD_HOME") or ".tenfold").absolute()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one stack."""

    path: Path

    @classmethod
    def of(cls, stack: str, home: Path) -> RunFolder:
        """Raises ValueError for a name that cannot be a folder's."""
        if not _STACK.fullmatch(stack):
            raise ValueError(f"a stack's name must be 1 to 41 of a-z, 0-9, - and _, got {stack!r}")
        chosen = os.environ.get("TENFOLD_RUN")
        return cls((Path(chosen).absolute() if chosen else home / "run") / stack)

    @property
    def stack(self) -> str:
        return self.path.name

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def supervisor_conf(self) -> Path:
        return self.path / "supervisord.conf"

    @property
    def supervisor_log(self) -> Path:
        return self.logs / "supervisor.log"

    @property
    def envoy(self) -> Path:
        return self.path / "envoy.json"

    @property
    def store(self) -> Path:
        return self.path / "valkey"

    @property
    def traces(self) -> Path:
        return self.path / "traces.db"

    @property
    def served(self) -> Path:
        """A sample of the feature rows that were served."""
        return self.path / "served"

    def log_of(self, process: str) -> Path:
        return self.logs / f"{process}.log"

    def make(self) -> None:
        """Makes the folders that are not there yet."""
        for folder in (self.path, self.logs, self.store):
            folder.mkdir(parents=True, exist_ok=True)


def option(stack: str) -> str:
    """What a command about this stack needs behind it, with the space before it."""
    return "" if stack == DEFAULT_STACK else f" --stack {stack}"


def make_sockets_folder() -> Path:
    """A short private folder: a Unix socket's path holds at most 107 bytes, and TENFOLD_HOME may be longer."""
    base = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - private: mkdtemp gives it mode 0700
    return Path(tempfile.mkdtemp(prefix=_SOCKETS_PREFIX, dir=base))


def remove_sockets_folder(path: Path) -> None:
    """Removes what `make_sockets_folder` made, and nothing else: the path comes from a file that may be old."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if path.name.startswith(_SOCKETS_PREFIX) and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
        shutil.rmtree(path, ignore_errors=True)


def set_logs_aside(run: RunFolder) -> None:
    """Keeps the logs of the run before as logs.before, so that those of this one begin with it."""
    before = run.logs.with_suffix(".before")
    shutil.rmtree(before, ignore_errors=True)
    run.logs.rename(before)
    run.make()
