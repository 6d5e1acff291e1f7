"""What a particular mesh needs before it can run: artefacts, and features in its store.

The demonstration makes its own. Any other mesh brings its artefacts, and fills its store by itself.

The work is done in a process of its own, which tells what it does line by line: `tenfold up` stays small while the
mesh runs, and can be interrupted meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from deploy.local.conf import python
from deploy.local.plan import tied
from deploy.local.state import StackError

Tell = Callable[[str, float], None]
"""Told what is being done now, in a few words, and which share of all is done, 0 to 1."""


class Hooks(Protocol):
    def prepare(self, home: Path, tell: Tell) -> None:
        """Makes the artefacts that are not there yet."""
        ...

    def fill(self, home: Path, store: str, tell: Tell) -> None:
        """Puts features into the store of a stack that is starting, unless they are there. store: as TENFOLD_STORE."""
        ...


class Flights:
    """Builds data, features and models once; fills the store with what was known when the replay begins."""

    def prepare(self, home: Path, tell: Tell) -> None:
        from deploy.flights import prepare

        prepare.prepare(home, tell)

    def fill(self, home: Path, store: str, tell: Tell) -> None:
        asyncio.run(self._fill(home, store, tell))

    async def _fill(self, home: Path, store: str, tell: Tell) -> None:
        from deploy.flights import replay
        from deploy.flights.views import VIEWS
        from services.feature.online.store import OnlineStore
        from services.feature.online.valkey import Valkey
        from services.feature.online.valkey_table import ValkeyTable

        async with Valkey(store) as valkey:
            await valkey.connected(5.0)
            online = OnlineStore(ValkeyTable(valkey), "flights")
            there = {view.name: view.schema().schema_hash for view in await online.views()}
            if there == {view.name: view.schema().schema_hash for view in VIEWS}:
                return
            # rows of other definitions: whoever reads would take their bytes for today's columns
            await valkey.call("FLUSHDB", timeout_s=30.0)
            tell("computing features", 0.0)
            await replay.fill(home, online)


_HOOKS: dict[str, Callable[[], Hooks]] = {"flights": Flights}


def prepare(mesh: str, home: Path, tell: Tell) -> None:
    """The artefacts of the mesh of this name. Raises StackError with what was wrong."""
    _perform(mesh, tell, "prepare", str(home))


def fill(mesh: str, home: Path, store: str, tell: Tell) -> None:
    """The features of the mesh of this name. Raises StackError with what was wrong."""
    _perform(mesh, tell, "fill", str(home), store)


def _perform(mesh: str, tell: Tell, what: str, *arguments: str) -> None:
    if mesh not in _HOOKS:
        return
    command = tied([*python("deploy.local.hooks"), mesh, what, *arguments])
    environ = os.environ | {"TENFOLD_PARENT": str(os.getpid())}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tell(*json.loads(line))
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            errors.seek(0)
            raise StackError(f"could not {what} {mesh}: {errors.read()[-4000:].strip()}")


def main() -> None:
    mesh, what, home, *store = sys.argv[1:]
    hooks = _HOOKS[mesh]()
    # what a library prints must not be taken for our lines
    out, sys.stdout = sys.stdout, sys.stderr

    def tell(doing: str, share: float) -> None:
        out.write(json.dumps([doing, share]) + "\n")
        out.flush()

    if what == "prepare":
        hooks.prepare(Path(home), tell)
    else:
        hooks.fill(Path(home), store[0], tell)


if __name__ == "__main__":
    main()
