"""Calls to other services: bytes out, bytes back, always with a deadline.

Everything goes through the gateway's egress listener, which knows the replicas, their health and the retry budget;
so a channel here is one connection to one address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

import grpc

from services.mesh.context import Metadata
from services.mesh.errors import callee_error
from services.mesh.h2channel import H2Channel
from services.mesh.h2headers import RequestHeaders

MAX_MESSAGE_BYTES = 16 * 2**20


class Channel(Protocol):
    """A connection that can be asked."""

    async def unary(self, method: str, request: bytes, *, timeout_s: float, metadata: Metadata = ()) -> bytes:
        """The answer of `method` ("/package.Service/Method").

        timeout_s: becomes grpc-timeout; above 0.
        Raises CalleeError for every status but OK, also where the callee cannot be reached, and BadInput for metadata
        that cannot travel: values are printable ASCII.
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
        self._closed = False

    async def unary(self, method: str, request: bytes, *, timeout_s: float, metadata: Metadata = ()) -> bytes:
        if not timeout_s > 0:  # grpcio would send the call, and wait for ever
            raise callee_error(method, grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed", ())
        call = self._methods.get(method)
        if call is None:
            call = self._methods[method] = cast(Unary, self._channel.unary_unary(method))
        try:
            return await call(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            trailers = tuple((key, str(value)) for key, value in error.trailing_metadata() or ())
            raise callee_error(method, error.code(), error.details(), trailers) from None
        except grpc.aio.InternalError:
            RequestHeaders("localhost").block(method, metadata)  # says what was wrong with the metadata
            raise
        except (grpc.aio.UsageError, asyncio.CancelledError):
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise  # it is our caller who was cancelled
            raise callee_error(method, grpc.StatusCode.UNAVAILABLE, "the channel is closed", ()) from None

    async def close(self) -> None:
        self._closed = True
        await self._channel.close()


KINDS = ("h2", "grpcio")


def open_channel(address: str, kind: str = "h2") -> Channel:
    """A channel to `address`; it connects at its first call.

    kind: "h2" costs about a third of the CPU of "grpcio"; it knows neither TLS nor balancing, which are the gateway's.
    """
    match kind:
        case "h2":
            return H2Channel(address, max_message_bytes=MAX_MESSAGE_BYTES)
        case "grpcio":
            return GrpcChannel(address)
        case _:
            raise ValueError(f"a channel must be {' or '.join(KINDS)}, got {kind!r}")
