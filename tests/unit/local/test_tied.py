"""What is tied to its parent ends when that is killed without a word."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.local.plan import tied
from deploy.local.state import Process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's doing")


def test_it_ends_when_its_parent_is_killed() -> None:
    sleeper = tied([sys.executable, "-c", "import time; print('there', flush=True); time.sleep(60)"])
    code = f"import subprocess; p = subprocess.Popen({sleeper!r}); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}  # its number, and that it is there
    child = Process.of(int(next(line for line in said if line.isdigit())))
    assert child.alive
    parent.kill()
    parent.communicate(timeout=10)  # ends when the child, too, has let go of the pipe
    until = time.monotonic() + 10
    while child.alive and time.monotonic() < until:
        time.sleep(0.01)
    assert not child.alive


def test_it_does_not_begin_where_its_parent_is_gone_already(tmp_path: Path) -> None:
    marker = tmp_path / "began"
    done = subprocess.run(tied(["touch", str(marker)]), env={**os.environ, "TENFOLD_PARENT": "1"}, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert not marker.exists()


def test_it_becomes_the_command(tmp_path: Path) -> None:
    environ = {**os.environ, "TENFOLD_PARENT": str(os.getpid())}
    done = subprocess.run(tied(["echo", "a b"]), env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "a b\n"
