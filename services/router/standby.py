"""The fallback service, asked instead of what failed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from google.protobuf.message import DecodeError

from services.mesh import attributes
from services.mesh.errors import CalleeError, callee_error
from services.mesh.query import Query
from services.mesh.telemetry import Recorded
from services.resilience.call import Call, Caller
from services.resilience.coalesce import Coalescer, Limits
from services.resilience.errors import CallError, DeadlineExceeded, Reason, Refused, Unavailable
from services.resilience.gate import Outcome
from services.router.callees import Callee, outcome_of, reason_of
from tenfold.router.v1 import router_pb2 as pb

PREDICT: Final = "/tenfold.router.v1.RouterService/Predict"
PREDICT_BATCH: Final = "/tenfold.router.v1.RouterService/PredictBatch"


class Standby:
    """Degraded answers from the fallback service."""

    def __init__(self, callee: Callee, limits: Limits) -> None:
        self._callee = callee
        self._limits = limits
        # the reason travels as metadata of the call, so those who share a call share a reason
        self._calls: dict[Reason, Coalescer[pb.PredictRequest, pb.PredictResponse]] = {}

    async def instead(self, query: Query, caller: Caller, cause: CallError) -> pb.PredictResponse:
        """A degraded answer for a request that `cause` kept from being answered.

        Where there is none either: Refused if both sides only had no room, DeadlineExceeded if no time was left,
        else Unavailable. Each names both causes.
        """
        if not query.model.fallbacks:
            raise _alone(cause)
        reason = reason_of(cause)
        calls = self._calls.get(reason)
        if calls is None:
            calls = self._calls[reason] = Coalescer(partial(self._ask, reason), self._limits)
        try:
            answer = await calls.ask(Call(query.request, caller))
        except CallError as second:
            raise _neither(cause, second) from second
        answer.degradation.detail = f"{cause}; {answer.degradation.detail}"
        return answer

    async def _ask(
        self, reason: Reason, calls: Sequence[Call[pb.PredictRequest]]
    ) -> Sequence[pb.PredictResponse | Exception]:
        def describe(span: Recorded) -> None:
            span.set(attributes.REASON, reason.label)
            span.set(attributes.BATCH_SIZE, len(calls))

        if len(calls) == 1:
            method, request = PREDICT, calls[0].request.SerializeToString()
        else:
            batch = pb.PredictBatchRequest(requests=[call.request for call in calls])
            method, request = PREDICT_BATCH, batch.SerializeToString()
        why = (attributes.DEGRADED_REASON, reason.label)
        raw = await self._callee.ask(method, request, [call.caller for call in calls], why, describe=describe)
        try:
            if len(calls) == 1:
                return [pb.PredictResponse.FromString(raw)]
            return [_unwrap(result) for result in pb.PredictBatchResponse.FromString(raw).results]
        except DecodeError as error:
            raise Unavailable(f"fallback: its answer cannot be read: {error}") from error


def fallback_outcome(error: CalleeError, timeout_s: float) -> Outcome:
    """As of any callee, except that having no answer to one request is an answer."""
    if error.explained and not error.refused and error.code.name == "UNAVAILABLE":
        return Outcome.OK
    return outcome_of(error, timeout_s)


def _unwrap(result: pb.PredictResult) -> pb.PredictResponse | Exception:
    if result.WhichOneof("kind") == "response":
        return result.response
    failure = result.failure
    return callee_error("fallback", failure.code, failure.message, ((attributes.SHED_REASON, _label(failure.reason)),))


_REASONS = frozenset(int(reason) for reason in Reason)


def _label(reason: int) -> str:
    return Reason(reason).label if reason in _REASONS else ""


def _neither(cause: CallError, second: CallError) -> CallError:
    """What to tell a client that neither the model nor fallback could answer."""
    detail = f"{cause}; fallback: {second}"
    if isinstance(second, DeadlineExceeded):
        return DeadlineExceeded(detail)
    if _shed(cause) and _shed(second):
        return Refused(reason_of(cause), detail)
    return Unavailable(detail, reason_of(cause))


def _alone(cause: CallError) -> CallError:
    """The same for a model that has no fallbacks. A callee's complaint about the request is not the client's fault."""
    if isinstance(cause, DeadlineExceeded):
        return cause
    return Refused(reason_of(cause), str(cause)) if _shed(cause) else Unavailable(str(cause), reason_of(cause))


def _shed(error: CallError) -> bool:
    """Whether the call had no room, rather than failed."""
    return reason_of(error) in (Reason.OVERLOADED, Reason.QUEUE_FULL)
