"""Work done in another process, often with another Python: a line of JSON asks, a line of JSON answers.

The other side is a module of this package that imports nothing of tenfold's but this package, so that it also runs
where tenfold is not installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
LONGEST_S = 300.0


def answer(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Calls what is asked for by name, until there is nothing more to read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            reply = {"result": functions[asked["do"]](**asked["arguments"])}
        except Exception as error:  # noqa: BLE001 - the asker decides, and the log has the rest
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


class Failed(RuntimeError):
    """The other process could not do what it was asked for; the message says where its log is."""


class Worker:
    """A process that runs `python -m module` and answers."""

    def __init__(self, python: Path, module: str, log: Path) -> None:
        self._command = [str(python), "-W", "ignore", "-m", module]
        self._module = module
        self._log = log

    def __enter__(self) -> Worker:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, do: str, timeout_s: float = LONGEST_S, **arguments: Any) -> Any:
        """What `do` returns there. A process that takes longer than `timeout_s` is ended. Raises Failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        too_late = threading.Timer(timeout_s, self._process.kill)
        too_late.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            too_late.cancel()
        if not line:
            raise Failed(f"{self._module} gave no answer to {do!r} within {timeout_s:.0f} s, see {self._log}")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(f"{self._module}: {do}: {reply['error']}, see {self._log}")
        return reply["result"]
