"""CPU time and memory of processes, read from the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Usage:
    """cpu_s: user and system time so far, seconds. pss_mb: proportional set size, 2**20 bytes: shared pages are
    counted once over all who share them.
    """

    cpu_s: float
    pss_mb: float


def usage(pids: Mapping[str, int]) -> dict[str, Usage]:
    """Of each named process."""
    found = {}
    for name, pid in pids.items():
        process = psutil.Process(pid)
        cpu = process.cpu_times()
        found[name] = Usage(cpu.user + cpu.system, process.memory_full_info().pss / 2**20)
    return found


def cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    """User and system seconds of each named process: cheaper than `usage`, for the edges of a measurement."""
    spent = {}
    for name, pid in pids.items():
        cpu = psutil.Process(pid).cpu_times()
        spent[name] = cpu.user + cpu.system
    return spent
