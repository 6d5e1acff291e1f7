"""What the processes of a stack have said, for a person."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_READ_BYTES = 256 * 1024
_STANDARD = ("at", "level", "instance", "logger", "event", "error")
LOOK_EVERY_S = 0.2


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log, oldest first; of a very long one at most what its last 256 KiB hold."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _READ_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-count:] if count else []
    except FileNotFoundError:
        return []


def follow(logs: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Every line from now on, as (log, line). Follows a log through its rotation, and waits for one to come."""
    tails = [Tail(log) for log in logs]
    while True:
        found = [(tail.log, line) for tail in tails for line in tail.new_lines()]
        yield from found
        if not found:
            time.sleep(LOOK_EVERY_S)


class Tail:
    """The growing end of one log. Lines that are there when it is made are not new."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._file: BinaryIO | None = None
        self._begun = b""
        if log.exists():
            self._file = log.open("rb")
            self._file.seek(0, 2)

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_lines(self) -> list[str]:
        found = self._read()
        if self._rotated():
            found += self._read()  # what was written to the old file after we had read it
            self.close()
        if self._file is None and self.log.exists():
            self._file = self.log.open("rb")
            found += self._read()
        return found

    def _read(self) -> list[str]:
        if self._file is None:
            return []
        *lines, self._begun = (self._begun + self._file.read()).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]

    def _rotated(self) -> bool:
        if self._file is None:
            return False
        try:
            now = self.log.stat()
        except FileNotFoundError:
            return True
        then = os.fstat(self._file.fileno())
        return (now.st_ino, now.st_dev) != (then.st_ino, then.st_dev) or now.st_size < self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def readable(line: str) -> str:
    """An event of services/mesh/logs.py in one readable line; any other line as it is."""
    try:
        event = json.loads(line)
        at, level, what = event["at"], event["level"], event["event"]
    except (ValueError, TypeError, KeyError):
        return line
    fields = " ".join(f"{key}={value}" for key, value in event.items() if key not in _STANDARD)
    text = f"{at[11:23]} {level:<7} {what}{'  ' + fields if fields else ''}"
    return f"{text}\n{event['error']}" if "error" in event else text
