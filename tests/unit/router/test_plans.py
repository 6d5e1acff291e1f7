from __future__ import annotations

import asyncio
import json

import grpc
import pytest

from services.mesh import meshfile
from services.mesh.errors import callee_error
from services.router.plans import CONFIG, DESCRIBE, METADATA, Plans
from tenfold.feature.v1 import feature_pb2
from tenfold.inference.v2 import inference_pb2
from tests.contract.standins import COLUMNS, MESH, VIEWS


class Mesh:
    """Answers what plans ask. down: methods that are unreachable. columns: model -> version -> names."""

    def __init__(self) -> None:
        self.down: set[str] = set()
        self.columns = {model: {"1": list(names)} for model, names in COLUMNS.items()}
        self.asked = 0

    async def __call__(self, method: str, request: bytes) -> bytes:
        self.asked += 1
        if method in self.down:
            raise callee_error(method, grpc.StatusCode.UNAVAILABLE, "down", ())
        if method == DESCRIBE:
            return self._views()
        if method == METADATA:
            name = inference_pb2.ModelMetadataRequest.FromString(request).name
            if name not in self.columns:
                raise callee_error(method, grpc.StatusCode.NOT_FOUND, "no such model", ())
            return inference_pb2.ModelMetadataResponse(versions=self.columns[name]).SerializeToString()
        asked = inference_pb2.ModelConfigRequest.FromString(request)
        response = inference_pb2.ModelConfigResponse()
        names = self.columns[asked.name][asked.version]
        response.config.parameters["tenfold.columns"].string_value = json.dumps(names)
        return response.SerializeToString()

    def _views(self) -> bytes:
        return feature_pb2.DescribeViewsResponse(
            views=[
                feature_pb2.ViewDescription(
                    name=view.name, entity=view.entity, columns=view.columns, schema_hash=view.schema_hash
                )
                for view in VIEWS.values()
            ]
        ).SerializeToString()


def plans_of(mesh: Mesh, refresh_s: float = 1000.0) -> Plans:
    return Plans(meshfile.parse(MESH), mesh, refresh_s)


def versions(plans: Plans, model: str = "delay") -> dict[str, str]:
    plan = plans.of(model)
    return {} if plan is None else {name: tier.version for name, tier in plan.tiers.items()}


async def test_the_newest_version_of_each_tier_is_planned() -> None:
    mesh = Mesh()
    mesh.columns["delay_small"] = {version: ["route.late"] for version in ("9", "10", "2")}
    plans = plans_of(mesh)
    assert await plans.refresh()
    assert versions(plans) == {"small": "10", "full": "1"}


async def test_an_unchanged_mesh_keeps_the_very_same_plans() -> None:
    plans = plans_of(Mesh())
    await plans.refresh()
    before = plans.of("delay")
    await plans.refresh()
    assert plans.of("delay") is before


async def test_who_does_not_answer_now_is_still_what_it_was() -> None:
    mesh = Mesh()
    plans = plans_of(mesh)
    await plans.refresh()
    for down in ({METADATA}, {DESCRIBE}, {CONFIG, METADATA}):
        mesh.down = down
        assert not await plans.refresh()
        assert versions(plans) == {"small": "1", "full": "1"}


async def test_a_model_that_is_gone_loses_its_tier_alone() -> None:
    mesh = Mesh()
    plans = plans_of(mesh)
    await plans.refresh()
    del mesh.columns["delay_small"]
    assert not await plans.refresh()
    assert versions(plans) == {"full": "1"}
    assert "no such model" in plans.problem("delay")
    assert plans.problem("bare") == "not asked yet"


async def test_columns_that_cannot_be_read_leave_the_tier_out_and_say_why() -> None:
    mesh = Mesh()
    mesh.columns["delay_small"]["1"] = ["ghost.late"]
    plans = plans_of(mesh)
    assert not await plans.refresh()
    assert versions(plans) == {"full": "1"}
    assert "reads view 'ghost'; there are route, tail" in plans.problem("delay")


@pytest.mark.parametrize("garbled", [DESCRIBE, METADATA, CONFIG])
async def test_an_answer_that_cannot_be_read_is_a_problem_and_not_the_end(garbled: str) -> None:
    mesh = Mesh()

    async def ask(method: str, request: bytes) -> bytes:
        return b"\xff\xff" if method == garbled else await mesh(method, request)

    plans = Plans(meshfile.parse(MESH), ask, 1000.0)
    assert not await plans.refresh()
    assert plans.of("delay") is None
    assert "not asked yet" not in plans.problem("delay")


async def test_what_is_unreachable_at_the_start_is_asked_again_until_it_answers() -> None:
    mesh = Mesh()
    mesh.down = {DESCRIBE}
    plans = plans_of(mesh)
    upkeep = asyncio.create_task(plans.run())
    try:
        async with asyncio.timeout(20):
            while mesh.asked < 2:  # noqa: ASYNC110 - the plans offer no event for a failed attempt
                await asyncio.sleep(0.005)
            mesh.down = set()
            await plans.complete.wait()
        assert versions(plans) == {"small": "1", "full": "1"}
        asked = mesh.asked
        plans.refresh_soon()
        async with asyncio.timeout(20):
            while mesh.asked == asked:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    finally:
        upkeep.cancel()
        await asyncio.gather(upkeep, return_exceptions=True)
