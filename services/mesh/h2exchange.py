"""One unary call on an HTTP/2 connection: what is still to send, and what has come back."""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc

from services.mesh.errors import callee_error
from services.mesh.h2headers import ResponseHeaders, status_of_http

_PREFIX_BYTES = 5  # compressed flag, length


class Carrier(Protocol):
    """The connection that an exchange runs on."""

    def abandon(self, exchange: Exchange) -> None:
        """Tells the peer that nobody waits for the answer any more."""
        ...


class Malformed(Exception):
    """The answer is not one gRPC message; the connection is fine."""

    def __init__(self, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class Exchange:
    """A request and its answer. `answer` is None from the moment it has been settled.

    head: the header block but for the timeout. deadline: on the loop's clock.
    given_back: how often the peer refused it unseen.
    unsent: the part of the request that flow control held back. window: what the peer lets this stream send.
    headers: the response's, once they are here. message: complete once it is not None.
    """

    __slots__ = (
        "answer",
        "carrier",
        "deadline",
        "given_back",
        "head",
        "headers",
        "message",
        "method",
        "partial",
        "request",
        "stream",
        "unsent",
        "window",
    )

    def __init__(
        self, method: str, head: bytes, request: bytes, deadline: float, answer: asyncio.Future[bytes]
    ) -> None:
        self.method, self.head, self.request, self.deadline = method, head, request, deadline
        self.answer: asyncio.Future[bytes] | None = answer
        self.given_back = 0
        self.reset()

    def reset(self) -> None:
        """Back to before it was sent."""
        self.carrier: Carrier | None = None
        self.stream = 0
        self.unsent: memoryview | None = None
        self.window = 0
        self.headers: ResponseHeaders | None = None
        self.message: bytes | None = None
        self.partial: bytearray | None = None

    def take(self, data: bytes, most: int) -> None:
        """Takes a piece of the answer. most: bytes that the message may have. Raises Malformed."""
        partial = self.partial
        if partial is None and self.message is None:
            size = len(data) - _PREFIX_BYTES
            if 0 <= size <= most and data[0] == 0 and int.from_bytes(data[1:_PREFIX_BYTES], "big") == size:
                self.message = data[_PREFIX_BYTES:]  # nearly always: the whole message in one frame
                return
            partial = self.partial = bytearray()
        if not data:
            return
        if partial is None:
            raise Malformed(grpc.StatusCode.INTERNAL, "a second message in the answer of a unary call")
        partial += data
        self._complete(partial, most)

    def _complete(self, partial: bytearray, most: int) -> None:
        if partial[0]:
            raise Malformed(grpc.StatusCode.INTERNAL, f"compressed flag {partial[0]}, and no compression was offered")
        if len(partial) < _PREFIX_BYTES:
            return
        size = int.from_bytes(partial[1:_PREFIX_BYTES], "big")
        if size > most:
            raise Malformed(grpc.StatusCode.RESOURCE_EXHAUSTED, f"a message of {size} bytes, must be at most {most}")
        if len(partial) > size + _PREFIX_BYTES:
            raise Malformed(grpc.StatusCode.INTERNAL, "a second message in the answer of a unary call")
        if len(partial) == size + _PREFIX_BYTES:
            self.message, self.partial = bytes(memoryview(partial)[_PREFIX_BYTES:]), None

    def end(self, trailers: ResponseHeaders) -> None:
        """Settles by the status that came last."""
        status = trailers.grpc_status
        if status == 0 and self.message is not None:
            answer = self._settle()
            if answer is not None:
                answer.set_result(self.message)
        elif status == 0:
            self.fail(grpc.StatusCode.INTERNAL, "status OK without a message")
        elif status is None:
            http_status = trailers.http_status or (self.headers.http_status if self.headers else 0)
            self.fail(status_of_http(http_status), f"HTTP status {http_status} and no gRPC status")
        else:
            answer = self._settle()
            if answer is not None:
                answer.set_exception(callee_error(self.method, status, trailers.message, trailers.metadata))

    def fail(self, code: grpc.StatusCode, message: str) -> None:
        answer = self._settle()
        if answer is not None:
            answer.set_exception(callee_error(self.method, code, message, ()))

    def abandon(self) -> None:
        """Nobody waits for the answer any more."""
        carrier = self.carrier
        self._settle()
        if carrier is not None:
            carrier.abandon(self)

    def _settle(self) -> asyncio.Future[bytes] | None:
        """The future to settle, if somebody still waits for it; lets go of everything large."""
        answer, self.answer = self.answer, None
        self.request, self.unsent, self.partial, self.carrier = b"", None, None, None
        return None if answer is None or answer.done() else answer
