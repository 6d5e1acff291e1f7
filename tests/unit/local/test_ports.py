import socket
from collections.abc import Iterator

import pytest

from deploy.local.ports import LOOPBACK, Ports
from deploy.local.state import StackError


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as server:
        server.bind((LOOPBACK, 0))
        server.listen(1)
        yield server.getsockname()[1]


def test_a_port_that_somebody_listens_on_is_skipped(taken: int) -> None:
    with Ports() as ports:
        assert ports.first_from(taken) > taken


def test_a_port_that_was_asked_for_and_is_taken_is_an_error_not_another_port(taken: int) -> None:
    with Ports() as ports, pytest.raises(StackError, match=f"port {taken} is taken"):
        ports.exactly(taken)


@pytest.mark.parametrize("port", [-1, 0, 65_536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with Ports() as ports, pytest.raises(StackError, match=f"must be 1 to 65535, got {port}"):
        ports.exactly(port)


def test_two_stacks_that_start_at_once_get_different_ports_and_give_them_back(taken: int) -> None:
    with Ports() as one, Ports() as two:
        first = one.first_from(taken + 1)
        assert two.first_from(taken + 1) > first
    with Ports() as three:
        assert three.exactly(first) == first


def test_a_port_claimed_by_a_stack_can_be_listened_on(taken: int) -> None:
    with Ports() as ports, socket.socket() as gateway:
        gateway.bind((LOOPBACK, ports.first_from(taken + 1)))
        gateway.listen(1)


def test_connections_of_a_former_server_do_not_hold_its_port() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((LOOPBACK, 0))
        server.listen(1)
        port = server.getsockname()[1]
        client = socket.create_connection((LOOPBACK, port))
        served, _ = server.accept()
        served.close()  # who closes first is left with TIME_WAIT
        client.close()
    with Ports() as ports:
        assert ports.exactly(port) == port
