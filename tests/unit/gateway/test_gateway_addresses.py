import pytest

from gateway.addresses import AddressError, envoy_address, listener_address, loopback_address, needs_dns


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("unix:/tmp/a.sock", {"pipe": {"path": "/tmp/a.sock"}}),
        ("unix:///tmp/a.sock", {"pipe": {"path": "/tmp/a.sock"}}),
        ("10.0.0.1:50051", {"socket_address": {"address": "10.0.0.1", "port_value": 50051}}),
        ("[::1]:50051", {"socket_address": {"address": "::1", "port_value": 50051}}),
        ("router:50051", {"socket_address": {"address": "router", "port_value": 50051}}),
    ],
)
def test_both_kinds_of_address_are_written_as_envoy_reads_them(address, written):
    assert envoy_address(address) == written


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("router", "host:port"),
        ("router:", "host:port"),
        (":80", "host:port"),
        ("router:0", "1 to 65535"),
        ("router:65536", "1 to 65535"),
        ("router:http", "1 to 65535"),
        ("unix:a.sock", "absolute"),
        ("unix:/" + "a" * 107, "at most 107 bytes, got 108"),
    ],
)
def test_an_address_that_cannot_be_used_says_what_is_allowed(address, says):
    with pytest.raises(AddressError, match=says):
        envoy_address(address)


def test_only_names_need_dns():
    assert needs_dns("router:50051")
    assert not any(map(needs_dns, ("10.0.0.1:1", "[::1]:1", "unix:/a")))


def test_a_listener_needs_an_ip_address_and_localhost_has_one():
    assert listener_address("localhost:1") == listener_address("127.0.0.1:1")
    with pytest.raises(AddressError, match="gateway:1"):
        listener_address("gateway:1")


@pytest.mark.parametrize("address", ["0.0.0.0:9901", "10.0.0.1:9901", "[::]:9901", "unix:/tmp/admin"])
def test_what_others_could_reach_is_not_loopback(address):
    with pytest.raises(AddressError, match="loopback"):
        loopback_address(address)
