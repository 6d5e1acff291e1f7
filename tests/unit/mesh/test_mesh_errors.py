from __future__ import annotations

from typing import cast
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from services.mesh.errors import CalleeError, callee_error, ending_of
from services.resilience.errors import (
    BadInput,
    CallError,
    DeadlineExceeded,
    NotFound,
    Reason,
    Refused,
    Unavailable,
    Violation,
)


@pytest.mark.parametrize(
    ("error", "code", "trailers", "reason"),
    [
        (
            Refused(Reason.QUEUE_FULL, "full", retry_after_s=0.0301),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            (("grpc-retry-pushback-ms", "31"), ("x-shed-reason", "queue_full")),
            Reason.QUEUE_FULL,
        ),
        (
            Refused(Reason.OVERLOADED, retry_after_s=-1),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            (("grpc-retry-pushback-ms", "-1"), ("x-shed-reason", "overloaded")),
            Reason.OVERLOADED,
        ),
        (
            DeadlineExceeded("too late"),
            grpc.StatusCode.DEADLINE_EXCEEDED,
            (("x-shed-reason", "deadline"),),
            Reason.DEADLINE,
        ),
        (NotFound("no model 'x'"), grpc.StatusCode.NOT_FOUND, (), Reason.UNSPECIFIED),
        (
            Unavailable("away", Reason.FEATURES_UNAVAILABLE),
            grpc.StatusCode.UNAVAILABLE,
            (("x-shed-reason", "features_unavailable"),),
            Reason.FEATURES_UNAVAILABLE,
        ),
        (
            CalleeError("/p.S/M", grpc.StatusCode.RESOURCE_EXHAUSTED, "full", Reason.QUEUE_FULL),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            (("x-shed-reason", "queue_full"),),
            Reason.QUEUE_FULL,
        ),
        (
            CalleeError("/p.S/M", grpc.StatusCode.INTERNAL, "broken"),
            grpc.StatusCode.UNAVAILABLE,
            (),
            Reason.DEPENDENCY_FAILED,
        ),
        (
            CalleeError("/p.S/M", grpc.StatusCode.UNKNOWN, "crashed"),
            grpc.StatusCode.UNAVAILABLE,
            (),
            Reason.DEPENDENCY_FAILED,
        ),
        (CallError("of a new kind"), grpc.StatusCode.UNAVAILABLE, (), Reason.DEPENDENCY_FAILED),
    ],
)
def test_each_error_has_its_status(
    error: CallError, code: grpc.StatusCode, trailers: tuple[tuple[str, str], ...], reason: Reason
) -> None:
    ending = ending_of(error)
    assert (ending.code, ending.message, ending.trailers, ending.reason) == (code, str(error), trailers, reason)


def test_bad_input_carries_its_violations() -> None:
    ending = ending_of(BadInput(Violation("model", "must be set"), Violation("entities", "at most 64, got 65")))
    assert ending.code is grpc.StatusCode.INVALID_ARGUMENT
    assert ending.message == "model: must be set; entities: at most 64, got 65"
    ((key, value),) = ending.trailers
    assert key == "grpc-status-details-bin"
    assert isinstance(value, bytes)
    bad_request = error_details_pb2.BadRequest()
    assert status_pb2.Status.FromString(value).details[0].Unpack(bad_request)
    assert [violation.field for violation in bad_request.field_violations] == ["model", "entities"]


@pytest.mark.parametrize(
    ("code", "trailers", "reason", "refused"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, (("x-shed-reason", "queue_full"),), Reason.QUEUE_FULL, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, (), Reason.OVERLOADED, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, (), Reason.DEADLINE, False),
        (grpc.StatusCode.UNAVAILABLE, (("x-shed-reason", "no such label"),), Reason.DEPENDENCY_FAILED, False),
        (14, (("x-shed-reason", "draining"),), Reason.DRAINING, False),
        (4711, (), Reason.DEPENDENCY_FAILED, False),
    ],
)
def test_a_callees_status_says_why_and_whether_it_shed(
    code: grpc.StatusCode | int, trailers: tuple[tuple[str, str], ...], reason: Reason, refused: bool
) -> None:
    error = callee_error("/p.S/M", code, None, trailers)
    assert (error.reason, error.refused, error.callee, error.message) == (reason, refused, "/p.S/M", "")


def test_an_unknown_code_counts_as_unknown() -> None:
    assert callee_error("/p.S/M", 4711, "?", ()).code is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize("quoted", ["x" * 1_000_000, "\u2708" * 1_000_000])
def test_a_status_fits_into_trailers_whatever_it_quotes(quoted: str) -> None:
    errors = [
        NotFound(quoted),
        Refused(Reason.QUEUE_FULL, quoted),
        Unavailable(quoted),
        BadInput(Violation("model", quoted)),
        BadInput(*(Violation(quoted, quoted) for _ in range(100))),
    ]
    for ending in map(ending_of, errors):
        # as they travel: text percent-encoded, bytes in base64
        sent = len(quote(ending.message, safe=" ")) + sum(4 * len(value) // 3 for _, value in ending.trailers)
        assert sent <= 8_000
        assert quoted[:300] in ending.message


def test_as_many_violations_are_told_as_have_room() -> None:
    ending = ending_of(BadInput(*(Violation(f"inputs[{at}].name", "must be one of a, b") for at in range(10_000))))
    status = status_pb2.Status.FromString(cast(bytes, dict(ending.trailers)["grpc-status-details-bin"]))
    bad_request = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad_request)
    assert 10 < len(bad_request.field_violations) < 100
    assert bad_request.field_violations[0].field == "inputs[0].name"
    assert status.message == ending.message
