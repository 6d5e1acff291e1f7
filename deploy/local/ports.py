"""Free ports on the loopback interface, not given to two stacks that start at the same moment."""

from __future__ import annotations

import errno
import socket
import sys
from types import TracebackType

from deploy.local.state import StackError

LOOPBACK = "127.0.0.1"
_TRIED = 200


class Ports:
    """Ports chosen for a stack, kept from others until it listens itself. A context manager.

    Nothing is bound meanwhile, because a gateway that shares its port with SO_REUSEPORT would share it with us. The
    claim is a name in Linux' abstract socket namespace, which vanishes with its process; elsewhere there is none.
    """

    def __init__(self) -> None:
        self._claims: list[socket.socket] = []

    def __enter__(self) -> Ports:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for claim in self._claims:
            claim.close()
        self._claims.clear()

    def exactly(self, port: int) -> int:
        """`port`, or StackError where it is taken."""
        if not 1 <= port <= 65_535:
            raise StackError(f"a port must be 1 to 65535, got {port}")
        if not self._take(port):
            raise StackError(f"port {port} is taken; choose another with --port, or leave it out")
        return port

    def first_from(self, port: int) -> int:
        """The lowest free port from `port` on."""
        for candidate in range(port, min(port + _TRIED, 65_536)):
            if self._take(candidate):
                return candidate
        raise StackError(f"none of the {_TRIED} ports from {port} on is free")

    def _take(self, port: int) -> bool:
        return _claimable(port, self._claims) and _unused(port)


def _claimable(port: int, claims: list[socket.socket]) -> bool:
    if sys.platform != "linux":
        return True
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0tenfold-port-{port}")
    except OSError as error:
        claim.close()
        if error.errno == errno.EADDRINUSE:
            return False
        raise
    claims.append(claim)
    return True


def _unused(port: int) -> bool:
    """Whether a server could listen there now. Connections of a former server in TIME_WAIT do not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((LOOPBACK, port))
            trial.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
