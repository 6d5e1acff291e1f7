"""CPU time of processes, read from the kernel."""

from __future__ import annotations

from collections.abc import Mapping

import psutil


def cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    """User and system seconds of each named process, so far."""
    spent = {}
    for name, pid in pids.items():
        cpu = psutil.Process(pid).cpu_times()
        spent[name] = cpu.user + cpu.system
    return spent
