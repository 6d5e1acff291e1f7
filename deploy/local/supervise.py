"""python -m deploy.local.supervise CONF STATE SOCKETS: supervisord, and what it leaves behind removed.

A process of its own, so that a stack outlives its terminal with --detach and is stopped in order when `tenfold up`
is killed without a word. Imports little: it sits beside the mesh for as long as that runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from supervisor import events, supervisord

from deploy.local.folders import remove_sockets_folder


class Spawns:
    """An XML-RPC interface: how often each process was started. Also says on stderr what died.

    supervisord knows whether a process runs, but not whether it is the first of its name or the tenth.
    """

    def __init__(self, daemon: supervisord.Supervisor) -> None:
        self._daemon = daemon
        self._counts: dict[str, int] = {}
        events.subscribe(events.ProcessStateStartingEvent, self._started)
        events.subscribe(events.ProcessStateExitedEvent, self._died)
        events.subscribe(events.ProcessStateBackoffEvent, self._died)

    def counts(self) -> dict[str, int]:
        """Process name -> how often it was started; at least 1."""
        return self._counts

    def _started(self, event: events.ProcessStateEvent) -> None:
        name = event.process.config.name
        self._counts[name] = self._counts.get(name, 0) + 1

    def _died(self, event: events.ProcessStateEvent) -> None:
        process = event.process
        if process.backoff:
            why, wait = "ended too early", f" in {process.backoff} s"
        else:  # supervisord keeps -1 of a process that a signal ended
            wait, status = "", process.exitstatus
            why = "was killed" if status == -1 else f"ended with status {status}"
        sys.stderr.write(f"tenfold: {process.config.name} {why}; starting it again{wait}\n")
        sys.stderr.flush()


def spawns(daemon: supervisord.Supervisor, **_: str) -> Spawns:
    """What [rpcinterface:tenfold] names."""
    return Spawns(daemon)


def main() -> None:
    conf, state, sockets = sys.argv[1:]
    os.environ["TENFOLD_PARENT"] = str(os.getpid())
    try:
        supervisord.main(["--nodaemon", "--silent", "--configuration", conf])
    finally:
        remove_sockets_folder(Path(sockets))
        Path(state).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
