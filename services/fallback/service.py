"""RouterService as the fallback service gives it, and Remember: protobuf in, protobuf out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

from services.fallback.answers import SKEW_S, Answer, Answers, Memory, NowUs, Remembered, answers_for
from services.fallback.settings import FallbackSettings
from services.mesh.meshfile import MeshFile, Model
from services.mesh.query import MAX_TEXT_BYTES, Query, check_batch, models_of, query_of
from services.mesh.reply import degraded_trailer, predict_each
from services.mesh.serve import unary
from services.mesh.telemetry import NO_TRACING, Tracing
from services.resilience.call import Call
from services.resilience.coalesce import Coalescer, Limits
from services.resilience.errors import BadInput, Reason, Unavailable, Violation
from tenfold.common.v1 import call_pb2
from tenfold.fallback.v1 import fallback_pb2
from tenfold.fallback.v1.fallback_pb2_grpc import FallbackServiceServicer
from tenfold.router.v1 import router_pb2 as pb
from tenfold.router.v1.router_pb2_grpc import RouterServiceServicer

log = logging.getLogger(__name__)

ROUTER_NAME = "tenfold.router.v1.RouterService"
FALLBACK_NAME = "tenfold.fallback.v1.FallbackService"
REMEMBER_MOST = 4096  # answers of one Remember, as the contract says


def wall_clock_us() -> int:
    return time.time_ns() // 1000


class Fallbacks:
    """Every model's ways to answer without it.

    One queue for all: it is bounded, and whoever finds it full is refused at once.
    """

    def __init__(self, mesh: MeshFile, settings: FallbackSettings, now_us: NowUs = wall_clock_us) -> None:
        self.models = models_of(mesh)
        self._now_us = now_us
        self._memory = Memory(settings.remember_at_most)
        self._answers: dict[str, list[Answers]] = {}
        self._broken: set[tuple[str, int]] = set()
        for model in mesh.models:
            usable, unusable = answers_for(model.fallbacks, model.output, settings.artefacts, self._memory, now_us)
            self._answers[model.name] = usable
            for kind, why in unusable.items():
                log.warning("fallback skipped", extra={"model": model.name, "kind": kind, "why": why})
        limits = Limits(settings.max_batch, max_in_flight=1, max_waiting=settings.max_waiting)
        self._calls: Coalescer[Query, Answer] = Coalescer(self._answer_all, limits)

    async def answer(self, call: Call[Query]) -> Answer:
        """Raises Refused where the queue is full, Unavailable where nothing has an answer."""
        return await self._calls.ask(call)

    def remember(self, answers: Sequence[fallback_pb2.GoodAnswer]) -> int:
        """How many were kept."""
        latest_us = self._now_us() + int(SKEW_S * 1e6)
        kept = 0
        for answer in answers:
            model = self.models.get(answer.model)
            if model is None or not _worth_keeping(model, answer, latest_us):
                continue
            outputs = [(output.name, tuple(output.values)) for output in answer.outputs]
            served_by = answer.served_by
            good = Remembered(outputs, served_by.model, served_by.model_version, answer.answered_us)
            kept += self._memory.keep(model.name, answer.entity_id, good)
        return kept

    async def _answer_all(self, calls: Sequence[Call[Query]]) -> Sequence[Answer | Exception]:
        """Asks each model's list from its front, for as many members as are still without an answer."""
        answers: list[Answer | Exception] = [Unavailable("not asked") for _ in calls]
        members: dict[str, list[int]] = {}
        for i, call in enumerate(calls):
            members.setdefault(call.request.model.name, []).append(i)
        for name, waiting in members.items():
            for rank, ask in enumerate(self._answers[name]):
                found = self._ask(name, rank, ask, [calls[i].request for i in waiting])
                for i, answer in zip(waiting, found, strict=True):
                    if answer is not None:
                        answers[i] = answer
                waiting = [i for i, answer in zip(waiting, found, strict=True) if answer is None]
                if not waiting:
                    break
            for i in waiting:
                answers[i] = Unavailable(f"fallback has no answer of model {name!r} for this request")
        return answers

    def _ask(self, name: str, rank: int, ask: Answers, queries: Sequence[Query]) -> Sequence[Answer | None]:
        try:
            return ask(queries)
        except Exception:  # whatever a small model does, the next in the list is still there
            if (name, rank) not in self._broken:
                self._broken.add((name, rank))
                log.exception("fallback failed", extra={"model": name, "kind": type(ask).__name__})
            return [None] * len(queries)


class FallbackServicer(RouterServiceServicer, FallbackServiceServicer):
    """What the router's clients get when there is no router, or the router has no model to ask."""

    def __init__(self, fallbacks: Fallbacks, tracing: Tracing = NO_TRACING, predict_batch_max: int = 256) -> None:
        self._fallbacks = fallbacks
        self.tracing = tracing
        self._predict_batch_max = predict_batch_max

    @unary(f"{ROUTER_NAME}/Predict", trailers=degraded_trailer)
    async def Predict(self, call: Call[pb.PredictRequest]) -> pb.PredictResponse:  # noqa: N802 - as in the contract
        return await self._predict(call)

    @unary(f"{ROUTER_NAME}/PredictBatch")
    async def PredictBatch(self, call: Call[pb.PredictBatchRequest]) -> pb.PredictBatchResponse:  # noqa: N802
        check_batch(len(call.request.requests), self._predict_batch_max)
        return await predict_each(call, self._predict)

    @unary(f"{ROUTER_NAME}/Explain")
    async def Explain(self, call: Call[pb.ExplainRequest]) -> pb.ExplainResponse:  # noqa: N802
        query = query_of(call.request.request, self._fallbacks.models)
        kinds = ", ".join(rule.kind for rule in query.model.fallbacks) or "nothing"
        why = f"this is the fallback service, which runs no tier; it answers by {kinds}"
        return pb.ExplainResponse(
            required_quality=query.model.required_quality.of(call.caller.priority),
            tiers=[
                pb.TierVerdict(
                    tier=tier.name,
                    model=tier.model,
                    why=why,
                    quality=tier.quality,
                    cost_usd=tier.usd_per_1000 / 1000,
                    expected_ms=tier.expected_ms,
                )
                for tier in sorted(query.model.tiers, key=lambda tier: tier.usd_per_1000)
            ],
        )

    @unary(f"{FALLBACK_NAME}/Remember")
    async def Remember(self, call: Call[fallback_pb2.RememberRequest]) -> fallback_pb2.RememberResponse:  # noqa: N802
        count = len(call.request.answers)
        if count > REMEMBER_MOST:
            raise BadInput(Violation("answers", f"must be at most {REMEMBER_MOST}, got {count}"))
        return fallback_pb2.RememberResponse(kept=self._fallbacks.remember(call.request.answers))

    async def _predict(self, call: Call[pb.PredictRequest]) -> pb.PredictResponse:
        query = query_of(call.request, self._fallbacks.models)
        # who comes without a reason comes from the gateway, which found no router
        label = call.caller.degraded_reason
        reason = Reason.parse(label) if label else Reason.ROUTER_UNREACHABLE
        return _response(query, await self._fallbacks.answer(Call(query, call.caller)), reason)


def _worth_keeping(model: Model, answer: fallback_pb2.GoodAnswer, latest_us: int) -> bool:
    """Whether an answer is one that could be repeated; one from the future would outlive every other."""
    return (
        any(rule.kind == "last_good" for rule in model.fallbacks)
        and 0 < len(answer.entity_id.encode()) <= MAX_TEXT_BYTES
        and 0 < answer.answered_us <= latest_us
        and len(answer.outputs) > 0
        and all(output.values and all(map(math.isfinite, output.values)) for output in answer.outputs)
    )


def _response(query: Query, answer: Answer, reason: Reason) -> pb.PredictResponse:
    return pb.PredictResponse(
        request_id=query.request.request_id,
        outputs=[pb.Output(name=name, values=values) for name, values in answer.outputs],
        served_by=pb.ServedBy(model=answer.model, model_version=answer.version, provider=answer.provider),
        degradation=call_pb2.Degradation(
            reason=int(reason),  # type: ignore[arg-type]
            detail=answer.detail,
            source=answer.source,
            age_s=answer.age_s,
        ),
        cost_usd=answer.cost_usd,
    )
