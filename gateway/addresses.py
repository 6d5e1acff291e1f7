"""Addresses as Envoy writes them."""

from __future__ import annotations

import ipaddress
from typing import Any

Config = dict[str, Any]

_MAX_UNIX_PATH = 107  # bytes; sun_path of sockaddr_un, less its terminating zero


class AddressError(ValueError):
    """An address that Envoy could not use; the message says what is allowed."""


def envoy_address(address: str) -> Config:
    """envoy.config.core.v3.Address of "host:port" or "unix:/path"."""
    if is_unix(address):
        return {"pipe": {"path": _unix_path(address)}}
    host, port = host_and_port(address)
    return {"socket_address": {"address": host, "port_value": port}}


def listener_address(address: str) -> Config:
    """As `envoy_address`, for an address to listen on: its host must be an IP address, or "localhost"."""
    if is_unix(address):
        return envoy_address(address)
    host, port = host_and_port(address)
    host = "127.0.0.1" if host == "localhost" else host
    if not _is_ip(host):
        raise AddressError(f"a listener's host must be an IP address or localhost, got {address!r}")
    return {"socket_address": {"address": host, "port_value": port}}


def loopback_address(address: str) -> Config:
    """As `listener_address`, for what only this machine may reach."""
    if is_unix(address):
        raise AddressError(f"must be a loopback host:port, got {address!r}")
    found = listener_address(address)
    if not ipaddress.ip_address(found["socket_address"]["address"]).is_loopback:
        raise AddressError(f"must be on loopback (127.0.0.1, ::1 or localhost), got {address!r}")
    return found


def is_unix(address: str) -> bool:
    return address.startswith("unix:")


def needs_dns(address: str) -> bool:
    """Whether a name has to be resolved to reach it."""
    return not is_unix(address) and not _is_ip(host_and_port(address)[0])


def host_and_port(address: str) -> tuple[str, int]:
    """The two halves of "host:port" or "[::1]:port"."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise AddressError(f'must be "host:port" (port 1 to 65535) or "unix:/path", got {address!r}')
    return host, int(port)


def _unix_path(address: str) -> str:
    path = address.removeprefix("unix:")
    if path.startswith("//"):
        path = path[2:]
    if not path.startswith("/"):
        raise AddressError(f"the path of a Unix socket must be absolute, got {address!r}")
    if (size := len(path.encode())) > _MAX_UNIX_PATH:
        raise AddressError(f"the path of a Unix socket must have at most {_MAX_UNIX_PATH} bytes, got {size}: {path}")
    return path


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
