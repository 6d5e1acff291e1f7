"""How RouterService answers, whoever serves it: the router, or the fallback service in its place."""

from __future__ import annotations

import asyncio

from services.mesh import attributes
from services.mesh.errors import ending_of
from services.mesh.serve import Trailers
from services.resilience.call import Call, Handler
from services.resilience.errors import CallError, Reason
from tenfold.router.v1 import router_pb2 as pb

Predict = Handler[pb.PredictRequest, pb.PredictResponse]


def degraded_trailer(answer: pb.PredictResponse) -> Trailers:
    """Says why an answer is degraded to those who do not read it: the gateway's log and its statistics."""
    if not answer.HasField("degradation"):
        return ()
    return ((attributes.DEGRADED_REASON, Reason(answer.degradation.reason).label),)


async def predict_each(call: Call[pb.PredictBatchRequest], predict: Predict) -> pb.PredictBatchResponse:
    """Every member of a batch at the same time, each for itself."""
    members = (_result(Call(request, call.caller), predict) for request in call.request.requests)
    return pb.PredictBatchResponse(results=await asyncio.gather(*members))


async def _result(call: Call[pb.PredictRequest], predict: Predict) -> pb.PredictResult:
    try:
        return pb.PredictResult(response=await predict(call))
    except CallError as error:
        ending = ending_of(error)
        reason = int(ending.reason)
        return pb.PredictResult(
            failure=pb.Failure(code=ending.code.value[0], message=ending.message, reason=reason)  # type: ignore[arg-type]
        )
