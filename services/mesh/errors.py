"""Our errors <-> gRPC status, in one table. Nothing else in the project knows status codes.

A shed is RESOURCE_EXHAUSTED, never UNAVAILABLE: retry policies conventionally name the latter, and a shed that is
retried at once is a storm.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from services.mesh import attributes
from services.mesh.context import Metadata
from services.resilience.errors import (
    BadInput,
    CallError,
    DeadlineExceeded,
    NotFound,
    Reason,
    Refused,
    Unavailable,
)

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DETAILS_KEY = "grpc-status-details-bin"

# A status travels as trailers. Clients refuse more than 8 KiB of them, and a proxy that is sent too many ends the
# connection and every other call on it. So what quotes a request is cut; both may grow to three bytes for each of
# text and four for three of details.
_MOST_MESSAGE_BYTES = 1024
_MOST_DETAILS_BYTES = 1536


class CalleeError(CallError):
    """A call to another service ended with a status other than OK.

    refused: the callee shed the call; this says nothing about its health.
    """

    def __init__(self, callee: str, code: grpc.StatusCode, message: str, reason: Reason = Reason.UNSPECIFIED) -> None:
        super().__init__(f"{callee}: {code.name}: {message}")
        self.callee = callee
        self.code = code
        self.message = message
        self._reason = reason

    @property
    def refused(self) -> bool:
        return self.code is grpc.StatusCode.RESOURCE_EXHAUSTED

    @property
    def explained(self) -> bool:
        """Whether the callee itself said why: it is alive, whatever it could not do."""
        return self._reason is not Reason.UNSPECIFIED

    @property
    def reason(self) -> Reason:
        """What to tell our own caller."""
        if self._reason is not Reason.UNSPECIFIED:
            return self._reason
        if self.refused:
            return Reason.OVERLOADED
        if self.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Reason.DEADLINE
        return Reason.DEPENDENCY_FAILED


class Ending(NamedTuple):
    """How a call that failed ends on the wire."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]
    reason: Reason


def ending_of(error: CallError) -> Ending:
    """The status of each of our errors."""
    message = _cut(str(error), _MOST_MESSAGE_BYTES)
    match error:
        case Refused():
            pushback = -1 if error.retry_after_s < 0 else math.ceil(error.retry_after_s * 1000)
            trailers = ((attributes.PUSHBACK_MS, str(pushback)), (attributes.SHED_REASON, error.reason.label))
            return Ending(grpc.StatusCode.RESOURCE_EXHAUSTED, message, trailers, error.reason)
        case DeadlineExceeded():
            late = ((attributes.SHED_REASON, Reason.DEADLINE.label),)
            return Ending(grpc.StatusCode.DEADLINE_EXCEEDED, message, late, Reason.DEADLINE)
        case BadInput():
            details = ((_DETAILS_KEY, _bad_request(error, message)),)
            return Ending(grpc.StatusCode.INVALID_ARGUMENT, message, details, Reason.UNSPECIFIED)
        case NotFound():
            return Ending(grpc.StatusCode.NOT_FOUND, message, (), Reason.UNSPECIFIED)
        case Unavailable():
            return Ending(
                grpc.StatusCode.UNAVAILABLE,
                message,
                ((attributes.SHED_REASON, error.reason.label),),
                error.reason,
            )
        case CalleeError() if error.code in _PASSED_ON:
            return Ending(error.code, message, ((attributes.SHED_REASON, error.reason.label),), error.reason)
        case _:
            return Ending(grpc.StatusCode.UNAVAILABLE, message, (), Reason.DEPENDENCY_FAILED)


_PASSED_ON = frozenset(
    {
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
    }
)


def callee_error(callee: str, code: grpc.StatusCode | int, message: str | None, trailers: Metadata) -> CalleeError:
    """The error for a status received from `callee`."""
    known = code if isinstance(code, grpc.StatusCode) else _CODES.get(code, grpc.StatusCode.UNKNOWN)
    reason = next((value for key, value in trailers if key == attributes.SHED_REASON), None)
    return CalleeError(callee, known, message or "", Reason.parse(reason))


def _bad_request(error: BadInput, message: str) -> bytes:
    """google.rpc.Status with the field violations, as grpc-status-details-bin carries it: as many as have room."""
    found = error_details_pb2.BadRequest()
    left = _MOST_DETAILS_BYTES
    for violation in error.violations:
        field, description = _cut(violation.field, _MOST_DETAILS_BYTES // 4), _cut(violation.description, left)
        left -= len(field.encode()) + len(description.encode())
        if left < 0:
            break
        found.field_violations.add(field=field, description=description)
    detail = any_pb2.Any()
    detail.Pack(found)
    status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=message, details=[detail])
    return bytes(status.SerializeToString())


def _cut(text: str, most_bytes: int) -> str:
    """`text`, or its beginning where it is longer than `most_bytes` of UTF-8."""
    if 4 * len(text) <= most_bytes or len(encoded := text.encode()) <= most_bytes:
        return text
    return encoded[: max(0, most_bytes - 3)].decode(errors="ignore") + "..."
