"""RouterService: protobuf in, protobuf out."""

from __future__ import annotations

from services.mesh.query import check_batch
from services.mesh.reply import degraded_trailer, predict_each
from services.mesh.serve import unary
from services.mesh.telemetry import Tracing
from services.resilience.call import Call
from services.router.predict import Predictor
from tenfold.router.v1 import router_pb2 as pb
from tenfold.router.v1.router_pb2_grpc import RouterServiceServicer

NAME = "tenfold.router.v1.RouterService"


class RouterServicer(RouterServiceServicer):
    def __init__(self, predictor: Predictor, tracing: Tracing, predict_batch_max: int) -> None:
        self._predictor = predictor
        self.tracing = tracing
        self._predict_batch_max = predict_batch_max

    @unary(f"{NAME}/Predict", trailers=degraded_trailer)
    async def Predict(self, call: Call[pb.PredictRequest]) -> pb.PredictResponse:  # noqa: N802 - as in the contract
        return await self._predictor.predict(call)

    @unary(f"{NAME}/PredictBatch")
    async def PredictBatch(self, call: Call[pb.PredictBatchRequest]) -> pb.PredictBatchResponse:  # noqa: N802
        check_batch(len(call.request.requests), self._predict_batch_max)
        return await predict_each(call, self._predictor.predict)

    @unary(f"{NAME}/Explain")
    async def Explain(self, call: Call[pb.ExplainRequest]) -> pb.ExplainResponse:  # noqa: N802
        return self._predictor.explain(Call(call.request.request, call.caller))
