"""Keeps the plans current: asks inference and feature what there is, again and again.

A router starts before the services it calls, and outlives their deployments. What could not be learned is asked
for again with back-off; what is known is looked at every few seconds, and at once when an answer contradicts it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from google.protobuf.message import DecodeError

from services.mesh.errors import CalleeError
from services.mesh.meshfile import MeshFile, Model, Tier
from services.resilience.errors import CallError
from services.router.plan import ModelPlan, PlanError, TierPlan, ViewShape, make_plan
from tenfold.feature.v1 import feature_pb2
from tenfold.inference.v2 import inference_pb2

log = logging.getLogger(__name__)

Ask = Callable[[str, bytes], Awaitable[bytes]]
"""The answer of a method ("/package.Service/Method") to a request; raises CallError."""

DESCRIBE: Final = "/tenfold.feature.v1.FeatureService/DescribeViews"
METADATA: Final = "/inference.GRPCInferenceService/ModelMetadata"
CONFIG: Final = "/inference.GRPCInferenceService/ModelConfig"
FIRST_RETRY_S: Final = 0.1
AT_MOST_EVERY_S: Final = 0.25  # however many answers contradict the plans


class Plans:
    """The plan of every model of the mesh, as far as it is known."""

    def __init__(self, mesh: MeshFile, ask: Ask, refresh_s: float) -> None:
        self._mesh = mesh
        self._ask = ask
        self._refresh_s = refresh_s
        self._stale = asyncio.Event()
        self._known: dict[str, ModelPlan] = {}
        self._problems: dict[str, str] = {}
        self.complete = asyncio.Event()

    def of(self, model: str) -> ModelPlan | None:
        """None until at least one of its tiers can be served."""
        return self._known.get(model)

    def problem(self, model: str) -> str:
        """Why there is no plan, for a person."""
        mine = [why for what, why in self._problems.items() if what in ("views", model) or what.startswith(f"{model}/")]
        return "; ".join(mine) or "not asked yet"

    def refresh_soon(self) -> None:
        """An answer contradicted a plan."""
        self._stale.set()

    async def run(self) -> None:
        """Until cancelled."""
        pause_s = FIRST_RETRY_S
        while True:
            self._stale.clear()
            if await self.refresh():
                self.complete.set()
                wait_s, pause_s = self._refresh_s, FIRST_RETRY_S
            else:
                wait_s, pause_s = pause_s, min(2 * pause_s, self._refresh_s)
            least_s = min(AT_MOST_EVERY_S, wait_s)
            await asyncio.sleep(least_s)
            try:
                async with asyncio.timeout(wait_s - least_s):
                    await self._stale.wait()
            except TimeoutError:
                pass

    async def refresh(self) -> bool:
        """Asks once. Whether everything answered and every tier of every model can be served."""
        try:
            views = await self._describe_views()
        except (CallError, DecodeError) as error:
            self._note("views", str(error))
            return False
        self._note("views", "")
        for model in self._mesh.models:
            self._keep(model, await self._plan_tiers(model, views))
        return not self._problems

    def _keep(self, model: Model, tiers: Mapping[str, TierPlan]) -> None:
        known = self._known.get(model.name)
        if known is not None and known.tiers == tiers:  # the very same plans: runners stay as they are
            return
        if not tiers:
            self._known.pop(model.name, None)
            return
        self._known[model.name] = ModelPlan(model, tiers)
        described = {name: f"{plan.version or '?'} on {plan.provider or '?'}" for name, plan in tiers.items()}
        log.info("plan changed", extra={"model": model.name, "tiers": described})

    async def _plan_tiers(self, model: Model, views: Mapping[str, ViewShape]) -> dict[str, TierPlan]:
        known = self._known.get(model.name)
        before = known.tiers if known is not None else {}
        tiers: dict[str, TierPlan] = {}
        for tier in model.tiers:
            name = f"{model.name}/{tier.name}"
            old = before.get(tier.name)
            try:
                plan = await self._plan(tier, views)
            except CalleeError as error:
                self._note(name, str(error))
                if old is not None and error.code.name != "NOT_FOUND":
                    tiers[tier.name] = old  # who does not answer now may still be what it was
            except (CallError, DecodeError, PlanError) as error:
                self._note(name, str(error))
            else:
                self._note(name, "")
                tiers[tier.name] = old if old is not None and old.identity == plan.identity else plan
        return tiers

    async def _plan(self, tier: Tier, views: Mapping[str, ViewShape]) -> TierPlan:
        version = tier.version or await self._newest_version(tier)
        request = inference_pb2.ModelConfigRequest(name=tier.model, version=version)
        raw = await self._ask(CONFIG, request.SerializeToString())
        parameters = inference_pb2.ModelConfigResponse.FromString(raw).config.parameters
        text = parameters["tenfold.columns"].string_value if "tenfold.columns" in parameters else ""
        provider = parameters["tenfold.provider"].string_value if "tenfold.provider" in parameters else ""
        try:
            names = json.loads(text)
        except ValueError:
            names = None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise PlanError(f"model {tier.model!r}: tenfold.columns must be a JSON list of names, got {text[:80]!r}")
        return make_plan(tier, version, provider, names, views)

    async def _newest_version(self, tier: Tier) -> str:
        """Pinned in every call for this plan, so that a deployment cannot change what the columns mean under it."""
        request = inference_pb2.ModelMetadataRequest(name=tier.model)
        raw = await self._ask(METADATA, request.SerializeToString())
        versions = inference_pb2.ModelMetadataResponse.FromString(raw).versions
        return max(
            versions,
            key=lambda version: (version.isdigit(), int(version) if version.isdigit() else 0, version),
            default="",
        )

    async def _describe_views(self) -> dict[str, ViewShape]:
        raw = await self._ask(DESCRIBE, feature_pb2.DescribeViewsRequest().SerializeToString())
        return {
            view.name: ViewShape(
                view.name, view.entity, tuple(view.columns), view.schema_hash, tuple(view.inputs), tuple(view.reads)
            )
            for view in feature_pb2.DescribeViewsResponse.FromString(raw).views
        }

    def _note(self, what: str, problem: str) -> None:
        """Logs a problem when it appears, changes or ends; not each time it is met."""
        if self._problems.get(what, "") == problem:
            return
        if problem:
            self._problems[what] = problem
            log.warning("cannot plan", extra={"what": what, "problem": problem})
        else:
            self._problems.pop(what, None)
            log.info("can plan again", extra={"what": what})
