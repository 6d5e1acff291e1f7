"""Small real services behind a real server, standing for what the router reaches through the gateway's egress.

They compute: a feature is a number made from its view, entity and column; a model is a weighted sum of its columns.
So a test can say what the right answer is, and every mix-up of rows, columns or requests shows.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from services.feature.define.schema import ViewSchema
from services.mesh.serve import unary
from services.resilience.call import Call, Caller
from services.resilience.errors import BadInput, NotFound, Reason, Refused, Unavailable, Violation
from tenfold.feature.v1 import feature_pb2
from tenfold.feature.v1.feature_pb2_grpc import FeatureServiceServicer
from tenfold.inference.v2 import inference_pb2
from tenfold.inference.v2.inference_pb2_grpc import GRPCInferenceServiceServicer

OUTPUT = "late_probability"
AGE_S = 60.0

MESH = """
version = 1
name = "test"

[gateway]
default_timeout_ms = 5000

[[priorities]]
name = "critical"
slo_p99_ms = 250
max_in_flight = 512
[[priorities]]
name = "standard"
slo_p99_ms = 500
max_in_flight = 256
[[priorities]]
name = "background"
slo_p99_ms = 2000
max_in_flight = 128

[[models]]
name = "delay"
output = "late_probability"
views = ["route", "tail"]
max_missing = 0.5
required_quality = { critical = 0.8, standard = 0.7, background = 0.6 }
[[models.tiers]]
name = "small"
model = "delay_small"
quality = 0.7
usd_per_1000 = 0.5
expected_ms = 5
[[models.tiers]]
name = "full"
model = "delay_full"
quality = 0.8
usd_per_1000 = 2.0
expected_ms = 10
[[models.fallbacks]]
kind = "last_good"
entity = "route"
max_age_s = 3600
[[models.fallbacks]]
kind = "onnx"
path = "small.onnx"
usd_per_1000 = 0.1
[[models.fallbacks]]
kind = "prior"
path = "prior.json"

[[models]]
name = "bare"
output = "late_probability"
views = ["route"]
max_missing = 1.0
required_quality = { critical = 0.5, standard = 0.5, background = 0.5 }
[[models.tiers]]
name = "only"
model = "bare_only"
quality = 0.5
usd_per_1000 = 1.0
expected_ms = 5
"""

VIEWS = {
    "route": ViewSchema("route", "route", ("late", "flights", "distance")),
    "tail": ViewSchema("tail", "tail", ("age", "late")),
}
COLUMNS: Mapping[str, Sequence[str]] = {
    "delay_small": ("input.hour", "entity.origin=EWR", "entity.origin=JFK", "route.late", "input.kind=jet"),
    "delay_full": (
        "tail.late",
        "input.hour",
        "route.flights",
        "route.late",
        "tail.age",
        "input.wind",
        "input.kind=jet",
    ),
    "bare_only": ("route.late", "route.distance"),
}
PRIOR = {
    "output": OUTPUT,
    "default": [0.25],
    "tables": [
        {"by": ["entity.origin", "input.hour"], "values": {"EWR|17": [0.5]}},
        {"by": ["entity.origin"], "values": {"EWR": [0.375]}},
    ],
}


GAP = ViewSchema("gap", "", ("headwind",))
"""A view on request: input wind + route.late - tail.age."""


def feature(view: str, entity_id: str, column: str) -> float:
    """A number that only this feature of this entity has; whole, so that sums are exact in float32."""
    return float(zlib.crc32(f"{view}/{entity_id}/{column}".encode()) % 1000)


def weight(model: str, column: str) -> float:
    return float(1 + zlib.crc32(f"{model}/{column}".encode()) % 7)


def right_answer(
    model: str, entities: Mapping[str, str], numbers: Mapping[str, float], texts: Mapping[str, str] | None = None
) -> float:
    """What `model` must answer, put together column by column; missing values count as 0."""
    total = 0.0
    for name in COLUMNS[model]:
        head, _, rest = name.partition(".")
        field_name, asks, wanted = rest.partition("=")
        if head == "entity":
            value = float(entities.get(field_name) == wanted)
        elif head == "input" and asks:
            value = float((texts or {}).get(field_name) == wanted)
        elif head == "input":
            value = numbers.get(field_name, 0.0)
        elif head == "gap":
            value = (
                numbers["wind"] + feature("route", entities["route"], "late") - feature("tail", entities["tail"], "age")
            )
        else:
            value = feature(head, entities[VIEWS[head].entity], rest)
        total += weight(model, name) * value
    return total


@dataclass
class Mood:
    """How a stand-in behaves now. open: cleared while its calls hang. cancelled: calls that were cancelled."""

    fails: bool = False
    refuses: set[str] = field(default_factory=set)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    calls: int = 0
    cancelled: int = 0
    callers: list[Caller] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open.set()

    async def face(self, caller: Caller, who: str = "") -> None:
        self.calls += 1
        self.callers.append(caller)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fails:
            raise Unavailable("it is down")
        if who in self.refuses:
            raise Refused(Reason.OVERLOADED, "no room")


class FeatureStandin(FeatureServiceServicer):
    """Entities named "new-..." have no row, those named "old-..." an expired one; "-quiet" ends a null column."""

    def __init__(self) -> None:
        self.mood = Mood()
        self.views = dict(VIEWS)
        self.batch_sizes: list[int] = []
        self.as_of_us: list[list[int]] = []
        self.has_gap = False

    @unary("tenfold.feature.v1.FeatureService/GetFeatures")
    async def GetFeatures(self, call: Call[feature_pb2.GetFeaturesRequest]) -> feature_pb2.GetFeaturesResponse:
        self.batch_sizes.append(max(len(keys.entity_ids) for keys in call.request.views))
        self.as_of_us.append(list(call.request.views[0].as_of_us))
        await self.mood.face(call.caller)
        rows = [self._rows(keys) for keys in call.request.views]
        if call.request.request_views:
            (wanted,) = call.request.request_views
            rows.append(self._gap(wanted, {keys.view: keys.entity_ids for keys in call.request.views}))
        return feature_pb2.GetFeaturesResponse(views=rows)

    @unary("tenfold.feature.v1.FeatureService/DescribeViews")
    async def DescribeViews(self, call: Call[feature_pb2.DescribeViewsRequest]) -> feature_pb2.DescribeViewsResponse:
        return feature_pb2.DescribeViewsResponse(
            views=[
                feature_pb2.ViewDescription(
                    name=view.name, entity=view.entity, columns=view.columns, schema_hash=view.schema_hash
                )
                for view in self.views.values()
            ]
            + [
                feature_pb2.ViewDescription(
                    name="gap",
                    columns=GAP.columns,
                    schema_hash=GAP.schema_hash,
                    inputs=["wind"],
                    reads=["route", "tail"],
                )
            ]
            * self.has_gap
        )

    def _gap(self, wanted: feature_pb2.RequestViewInputs, ids: Mapping[str, Sequence[str]]) -> feature_pb2.ViewRows:
        winds = wanted.inputs["wind"].values
        assert len(winds) == len(ids["route"]) == len(ids["tail"])
        values = [
            wind + feature("route", route, "late") - feature("tail", tail, "age")
            for wind, route, tail in zip(winds, ids["route"], ids["tail"], strict=True)
        ]
        return feature_pb2.ViewRows(
            view="gap",
            schema_hash=GAP.schema_hash,
            columns=1,
            values=np.array(values, "<f4").tobytes(),
            status=bytes([feature_pb2.STATUS_OK]) * len(winds),
            event_us=np.full(len(winds), 1, "<i8").tobytes(),
            age_s=np.full(len(winds), AGE_S, "<f4").tobytes(),
        )

    def _rows(self, keys: feature_pb2.ViewKeys) -> feature_pb2.ViewRows:
        view = self.views[keys.view]
        shape = len(keys.entity_ids), len(view.columns)
        values, status = np.full(shape, np.nan, "<f4"), np.empty(shape, np.uint8)
        age_s = np.full(shape[0], AGE_S, "<f4")
        for i, entity_id in enumerate(keys.entity_ids):
            if entity_id.startswith("new-"):
                status[i], age_s[i] = feature_pb2.STATUS_MISSING, np.nan
            elif entity_id.startswith("old-"):
                status[i], age_s[i] = feature_pb2.STATUS_EXPIRED, 1e6
            else:
                status[i] = feature_pb2.STATUS_OK
                values[i] = [feature(view.name, entity_id, column) for column in view.columns]
                if entity_id.endswith("-quiet"):
                    status[i, 0], values[i, 0] = feature_pb2.STATUS_NULL, np.nan
        event_us = np.full(shape[0], time.time_ns() // 1000, "<i8")
        return feature_pb2.ViewRows(
            view=view.name,
            schema_hash=view.schema_hash,
            columns=shape[1],
            values=values.tobytes(),
            status=status.tobytes(),
            event_us=event_us.tobytes(),
            age_s=age_s.tobytes(),
        )


class InferenceStandin(GRPCInferenceServiceServicer):
    """Serves the models of COLUMNS as weighted sums, each in the versions listed for it."""

    def __init__(self) -> None:
        self.mood = Mood()
        self.versions = {name: ["1"] for name in COLUMNS}
        self.columns: dict[tuple[str, str], Sequence[str]] = {(name, "1"): columns for name, columns in COLUMNS.items()}
        self.batch_sizes: list[int] = []
        self.asked: list[str] = []

    @unary("inference.GRPCInferenceService/ModelMetadata")
    async def ModelMetadata(
        self, call: Call[inference_pb2.ModelMetadataRequest]
    ) -> inference_pb2.ModelMetadataResponse:
        name = call.request.name
        if name not in self.versions:
            raise NotFound(f"no model {name!r}")
        return inference_pb2.ModelMetadataResponse(name=name, versions=self.versions[name])

    @unary("inference.GRPCInferenceService/ModelConfig")
    async def ModelConfig(self, call: Call[inference_pb2.ModelConfigRequest]) -> inference_pb2.ModelConfigResponse:
        columns = self._columns_of(call.request.name, call.request.version)
        config = inference_pb2.ModelConfig(name=call.request.name)
        config.parameters["tenfold.columns"].string_value = json.dumps(list(columns))
        config.parameters["tenfold.provider"].string_value = "CPUExecutionProvider"
        return inference_pb2.ModelConfigResponse(config=config)

    @unary("inference.GRPCInferenceService/ModelInfer")
    async def ModelInfer(self, call: Call[inference_pb2.ModelInferRequest]) -> inference_pb2.ModelInferResponse:
        request = call.request
        self.asked.append(request.model_name)
        await self.mood.face(call.caller, request.model_name)
        columns = self._columns_of(request.model_name, request.model_version)
        (tensor,) = request.inputs
        rows, width = tensor.shape
        if (tensor.name, tensor.datatype, width) != ("features", "FP32", len(columns)):
            raise BadInput(Violation("inputs", f"must be features FP32 [n,{len(columns)}], got {tensor}"))
        self.batch_sizes.append(rows)
        features = np.frombuffer(request.raw_input_contents[0], "<f4").reshape(rows, width)
        weights = np.array([weight(request.model_name, column) for column in columns])
        answer = (np.nan_to_num(features).astype(np.float64) @ weights).astype("<f4")
        output = inference_pb2.ModelInferResponse.InferOutputTensor(name=OUTPUT, datatype="FP32", shape=[rows, 1])
        return inference_pb2.ModelInferResponse(
            model_name=request.model_name,
            model_version=request.model_version,
            outputs=[output],
            raw_output_contents=[answer.tobytes()],
        )

    def _columns_of(self, name: str, version: str) -> Sequence[str]:
        columns = self.columns.get((name, version))
        if columns is None or version not in self.versions.get(name, ()):
            raise NotFound(f"no version {version!r} of model {name!r}")
        return columns


def write_artefacts(folder: Path) -> None:
    """The files behind the fallbacks of MESH: a small model and a prior."""
    (folder / "prior.json").write_text(json.dumps(PRIOR))
    columns = ["input.hour", "entity.origin=EWR"]
    weights = np.array([[0.01], [0.5]], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("IsNaN", ["features"], ["null"]),
            helper.make_node("Where", ["null", "zero", "features"], ["filled"]),
            helper.make_node("MatMul", ["filled", "weights"], [OUTPUT]),
        ],
        "small",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", len(columns)])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", 1])],
        [
            helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
            helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.flatten().tolist()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {"tenfold.columns": json.dumps(columns)})
    onnx.save(model, folder / "small.onnx")
