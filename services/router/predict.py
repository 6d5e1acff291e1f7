"""One prediction from end to end: tier, features, inference, and fallback for what went wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from services.mesh.meshfile import MeshFile, Model, Tier
from services.mesh.query import Query, models_of, query_of
from services.resilience.breaker import State
from services.resilience.call import Call, Caller, Clock
from services.resilience.coalesce import Limits
from services.resilience.errors import BadInput, CallError, DeadlineExceeded, NotFound, Reason, Refused, Unavailable
from services.router.callees import Callee, Network, reason_of
from services.router.features import Features, Gathered, Wanted
from services.router.plan import ModelPlan, TierPlan
from services.router.plans import Plans
from services.router.policy import Candidate, Choice, choose, verdict
from services.router.remember import Remember
from services.router.settings import RouterSettings
from services.router.shadow import Shadow
from services.router.standby import Standby, fallback_outcome
from services.router.tiers import Inferred, TierBusy, TierRunner
from tenfold.common.v1 import call_pb2
from tenfold.router.v1 import router_pb2 as pb

RESERVE_SHARE: Final = 0.2  # of the time left, kept back for fallback
RESERVE_MOST_S: Final = 0.05  # more than a fallback that works ever needs
PLANNING_TIMEOUT_S: Final = 1.0


class Predictor:
    """Answers predictions for every model of a mesh. Belongs to one event loop."""

    def __init__(
        self, mesh: MeshFile, settings: RouterSettings, network: Network, clock: Clock = time.monotonic
    ) -> None:
        self._models = models_of(mesh)
        self._cheapest_first = {
            model.name: sorted(model.tiers, key=lambda tier: (tier.usd_per_1000, -tier.quality))
            for model in mesh.models
        }
        self._default_timeout_s = mesh.gateway.default_timeout_ms / 1000
        self._limits: Limits = settings.limits
        self._clock = clock
        self._network = network
        self._feature = Callee("feature", network)
        self._fallback = Callee("fallback", network, fallback_outcome)
        self.plans = Plans(mesh, self._ask_for_plans, settings.refresh_s)
        self.features = Features(self._feature, self._limits, self.plans.refresh_soon)
        # a breaker per model: one that is broken must not close the others
        self._inference = {
            tier.model: Callee(f"inference/{tier.model}", network) for model in mesh.models for tier in model.tiers
        }
        self._runners: dict[str, TierRunner] = {}
        self.standby = Standby(self._fallback, self._limits)
        self.shadow = Shadow(self._fallback, settings.shadow_every)
        self.remember = Remember(mesh, self._fallback, settings.remember_s)

    async def run(self) -> None:
        """Keeps plans current and fallback informed, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.plans.run())
                group.create_task(self.remember.run())
        finally:
            await self.shadow.close()

    def breakers(self) -> dict[str, State]:
        """Callee -> the state of its breaker."""
        return {
            callee.name: callee.breaker.state for callee in (self._feature, self._fallback, *self._inference.values())
        }

    async def predict(self, call: Call[pb.PredictRequest]) -> pb.PredictResponse:
        """The model's answer, or a degraded one.

        Raises BadInput and NotFound for what can never succeed; Refused, DeadlineExceeded or Unavailable where
        neither the model nor fallback could answer.
        """
        query = query_of(call.request, self._models)
        now = self._clock()
        caller = self._bounded(call.caller, now)
        if caller.deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        if query.model.fallbacks:
            self.shadow.see(call.request)
        try:
            answer = await self._by_model(query, caller, now)
        except (BadInput, NotFound):
            raise
        except CallError as cause:
            return await self.standby.instead(query, caller, cause)
        if not answer.HasField("degradation"):
            self.remember.note(query, answer)
        return answer

    def explain(self, call: Call[pb.PredictRequest]) -> pb.ExplainResponse:
        """Which tier a request would be sent to now. Raises BadInput and NotFound as `predict` does."""
        query = query_of(call.request, self._models)
        plan = self.plans.of(query.model.name)
        if plan is not None:
            plan.check(query)
        now = self._clock()
        remaining_s = self._time_to_work(self._bounded(call.caller, now), now) - now
        required = query.model.required_quality.of(call.caller.priority)
        candidates = self._candidates(query.model, plan)
        choice = choose(candidates, required, remaining_s, call.request.tier)
        return pb.ExplainResponse(
            tier=choice.tier.name if choice.tier else "",
            required_quality=required,
            tiers=[
                pb.TierVerdict(
                    tier=candidate.tier.name,
                    model=candidate.tier.model,
                    chosen=choice.tier is candidate.tier,
                    why=verdict(candidate, choice, required, remaining_s),
                    quality=candidate.tier.quality,
                    cost_usd=candidate.tier.usd_per_1000 / 1000,
                    expected_ms=candidate.expected_s * 1000,
                )
                for candidate in candidates
            ],
        )

    async def _by_model(self, query: Query, caller: Caller, now: float) -> pb.PredictResponse:
        plan = self.plans.of(query.model.name)
        if plan is None:
            raise Unavailable(f"no tier of {query.model.name!r} can be served: {self.plans.problem(query.model.name)}")
        plan.check(query)
        due = self._time_to_work(caller, now)
        worker = Caller(caller.priority, due, caller.tenant, caller.cohort, caller.traceparent)
        required = query.model.required_quality.of(caller.priority)
        candidates = self._candidates(query.model, plan)
        choice = choose(candidates, required, due - now, query.request.tier)
        if choice.tier is None:
            raise _unserved(choice)
        try:
            return await self._by_tier(query, worker, plan.tiers[choice.tier.name], choice)
        except TierBusy as busy:
            lower = self._lower(choice.tier, query, plan, due)
            if lower is None:
                raise
            choice = Choice(lower, reason_of(busy), str(busy))
            return await self._by_tier(query, worker, plan.tiers[lower.name], choice)

    def _lower(self, busy: Tier, query: Query, plan: ModelPlan, due: float) -> Tier | None:
        """Another tier to try once where `busy` alone had no room, if one can answer in time."""
        if query.request.tier:
            return None
        others = [entry for entry in self._candidates(query.model, plan) if entry.tier.quality < busy.quality]
        return choose(others, busy.quality, due - self._clock()).tier if others else None

    async def _by_tier(self, query: Query, worker: Caller, plan: TierPlan, choice: Choice) -> pb.PredictResponse:
        try:
            gathered = await self.features.of(Call(Wanted(query, plan), worker))
        except CallError as error:
            failure = _feature_failure(error)
            if query.model.max_missing < 1:
                raise failure from error
            # this model's owner declared that it may answer without a single feature
            gathered = Gathered.nothing(plan)
            choice = Choice(plan.tier, reason_of(failure), str(failure))
        if gathered.missing_share > query.model.max_missing:
            share, most = gathered.missing_share, query.model.max_missing
            what = f"feature: {share:.0%} of the values are missing or expired, at most {most:.0%} may be"
            raise Unavailable(what, Reason.FEATURES_UNAVAILABLE)
        plan.complete(gathered.row, query)
        inferred = await self._runner(query.model, plan).answer(Call(gathered.row, worker))
        return _response(query, plan, choice, gathered, inferred)

    def _runner(self, model: Model, plan: TierPlan) -> TierRunner:
        key = f"{model.name}/{plan.tier.name}"
        runner = self._runners.get(key)
        if runner is None or runner.plan is not plan:
            callee = self._inference[plan.tier.model]
            runner = self._runners[key] = TierRunner(plan, model.output, callee, self._limits, self.plans.refresh_soon)
        return runner

    def _candidates(self, model: Model, plan: ModelPlan | None) -> Sequence[Candidate]:
        """The model's tiers as they stand now, cheapest first."""
        served = plan.tiers if plan is not None else {}
        candidates = []
        for tier in self._cheapest_first[model.name]:
            tier_plan = served.get(tier.name)
            if tier_plan is None:
                candidates.append(Candidate(tier, tier.expected_ms / 1000, ready=False))
                continue
            runner = self._runner(model, tier_plan)
            waits_s = runner.wait_s + (self.features.wait_s if tier_plan.views else 0.0)
            candidates.append(Candidate(tier, tier.expected_ms / 1000 + waits_s, True, runner.callee.breaker.refuses))
        return candidates

    def _bounded(self, caller: Caller, now: float) -> Caller:
        """A client that sets no deadline still does not wait for ever."""
        latest = now + self._default_timeout_s
        if caller.deadline != float("inf"):
            return caller
        return Caller(caller.priority, latest, caller.tenant, caller.cohort, caller.traceparent)

    @staticmethod
    def _time_to_work(caller: Caller, now: float) -> float:
        """When the model's answer is due, so that fallback still has time to answer instead."""
        return caller.deadline - min(RESERVE_SHARE * (caller.deadline - now), RESERVE_MOST_S)

    async def _ask_for_plans(self, method: str, request: bytes) -> bytes:
        return await self._network.channel.unary(method, request, timeout_s=PLANNING_TIMEOUT_S)


def _unserved(choice: Choice) -> CallError:
    """Why no tier could be asked at all, as an error that leads to fallback."""
    reason = choice.reason or Reason.DEPENDENCY_FAILED
    if reason is Reason.DEADLINE:
        return DeadlineExceeded(f"no tier answers in time: {choice.why}")
    if reason is Reason.CIRCUIT_OPEN:
        return Refused(reason, choice.why)
    return Unavailable(choice.why, reason)


def _feature_failure(error: CallError) -> CallError:
    """Sheds and open breakers keep their reason; whatever else happened, the features are what is missing."""
    if isinstance(error, Refused):
        return error
    reason = reason_of(error)
    if reason in (Reason.OVERLOADED, Reason.QUEUE_FULL):
        return Unavailable(str(error), reason)
    return Unavailable(f"feature: {error}", Reason.FEATURES_UNAVAILABLE)


def _response(
    query: Query, plan: TierPlan, choice: Choice, gathered: Gathered, inferred: Inferred
) -> pb.PredictResponse:
    tier = plan.tier
    response = pb.PredictResponse(
        request_id=query.request.request_id,
        outputs=[pb.Output(name=query.model.output, values=inferred.values)],
        served_by=pb.ServedBy(
            tier=tier.name, model=tier.model, model_version=inferred.version or plan.version, provider=plan.provider
        ),
        cost_usd=tier.usd_per_1000 / 1000,
    )
    if plan.views:
        features = response.features
        features.max_age_s = gathered.max_age_s
        features.ok, features.null = gathered.ok, gathered.null
        features.missing, features.expired = gathered.missing, gathered.expired
    if choice.reason is not None:
        response.degradation.CopyFrom(
            call_pb2.Degradation(reason=int(choice.reason), detail=choice.why, source=tier.name)  # type: ignore[arg-type]
        )
    return response
