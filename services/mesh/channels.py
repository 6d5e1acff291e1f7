"""Calls to other services: bytes out, bytes back, always with a deadline.

Everything goes through the gateway's egress listener, which knows the replicas, their health and the retry budget;
so a channel here is one connection to one address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import grpc

from services.mesh.context import Metadata
from services.mesh.errors import callee_error

MAX_MESSAGE_BYTES = 16 * 2**20


class Channel(Protocol):
    """A connection that can be asked."""

    async def unary(self, method: str, request: bytes, *, timeout_s: float, metadata: Metadata = ()) -> bytes:
        """The answer of `method` ("/package.Service/Method").

        timeout_s: becomes grpc-timeout; above 0.
        Raises CalleeError for every status but OK, also where the callee cannot be reached.
        """
        ...

    async def close(self) -> None: ...


Unary = Callable[..., grpc.aio.UnaryUnaryCall[bytes, bytes]]


class GrpcChannel:
    """A Channel over grpc.aio."""

    def __init__(self, address: str) -> None:
        """address: "host:port" or "unix:/path"."""
        self._channel = grpc.aio.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.enable_retries", 0),  # one layer retries, and that is the gateway
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._methods: dict[str, Unary] = {}

    async def unary(self, method: str, request: bytes, *, timeout_s: float, metadata: Metadata = ()) -> bytes:
        call = self._methods.get(method)
        if call is None:
            call = self._methods[method] = cast(Unary, self._channel.unary_unary(method))
        try:
            return await call(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            trailers = tuple((key, str(value)) for key, value in error.trailing_metadata() or ())
            raise callee_error(method, error.code(), error.details(), trailers) from None

    async def close(self) -> None:
        await self._channel.close()
