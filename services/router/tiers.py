"""Inference by one tier: the rows of many requests in one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from services.mesh import attributes
from services.mesh.errors import CalleeError
from services.mesh.telemetry import Recorded
from services.resilience.call import Call
from services.resilience.coalesce import Coalescer, Limits
from services.resilience.errors import Reason, Refused, Unavailable
from services.router.callees import Callee, reason_of
from services.router.plan import Floats, TierPlan
from tenfold.inference.v2 import inference_pb2 as pb

INFER: Final = "/inference.GRPCInferenceService/ModelInfer"


class TierBusy(Refused):
    """The inference service, or our own queue in front of it, had no room for this tier."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """values: the tier's answer. version: of the model that gave it."""

    values: list[float]
    version: str


class TierRunner:
    """Asks one version of one tier's model. A new version gets a new runner, the old one finishes what it has."""

    def __init__(self, plan: TierPlan, output: str, callee: Callee, limits: Limits, stale: Callable[[], None]) -> None:
        """output: name of the tensor that is the answer. stale: told when the model's version is another."""
        self.plan = plan
        self.callee = callee
        self._output = output
        self._limits = limits
        self._stale = stale
        self._calls: Coalescer[Floats, Inferred] = Coalescer(self._infer, limits)
        self._request = pb.ModelInferRequest(
            model_name=plan.tier.model,
            model_version=plan.version,
            inputs=[
                pb.ModelInferRequest.InferInputTensor(name="features", datatype="FP32", shape=[0, len(plan.names)])
            ],
            raw_input_contents=[b""],
        )

    async def answer(self, call: Call[Floats]) -> Inferred:
        """The answer for one complete row. Raises TierBusy where this tier alone is known to have no room."""
        try:
            return await self._calls.ask(call)
        except CalleeError as error:
            if error.refused:
                raise TierBusy(reason_of(error), str(error)) from error
            raise
        except Refused as error:
            if error.reason is Reason.QUEUE_FULL:
                raise TierBusy(error.reason, f"{self.callee.name}: {error}") from error
            raise

    @property
    def wait_s(self) -> float:
        """How long a row waits before it leaves, seconds."""
        return self.callee.wait_s(len(self._calls), self._limits.max_batch, self._limits.max_in_flight)

    async def _infer(self, calls: Sequence[Call[Floats]]) -> Sequence[Inferred | Exception]:
        request = self._request
        request.inputs[0].shape[0] = len(calls)
        request.raw_input_contents[0] = b"".join([call.request.tobytes() for call in calls])

        def describe(span: Recorded) -> None:
            span.set(attributes.MODEL, self.plan.tier.model)
            span.set(attributes.MODEL_VERSION, self.plan.version)
            span.set(attributes.TIER, self.plan.tier.name)
            span.set(attributes.PROVIDER, self.plan.provider)
            span.set(attributes.BATCH_SIZE, len(calls))

        try:
            raw = await self.callee.ask(
                INFER, request.SerializeToString(), [call.caller for call in calls], describe=describe
            )
        except CalleeError as error:
            if error.code.name in ("NOT_FOUND", "INVALID_ARGUMENT"):
                self._stale()  # the version was unloaded, or replaced by one with other columns
            raise
        try:
            response = pb.ModelInferResponse.FromString(raw)
            values = _output_of(response, self._output, len(calls))
        except (DecodeError, ValueError, IndexError) as error:
            raise Unavailable(f"{self.callee.name}: its answer cannot be read: {error}") from error
        version = response.model_version
        if self.plan.version and version and version != self.plan.version:
            self._stale()
            what = f"{self.callee.name}: version {version} answered, not {self.plan.version}; its columns may differ"
            raise Unavailable(what)
        return [
            Inferred(row, version)
            if all(map(math.isfinite, row))
            else Unavailable(f"{self.callee.name}: its answer is not a number: {row}")
            for row in values.tolist()
        ]


def _output_of(response: pb.ModelInferResponse, name: str, rows: int) -> Floats:
    """float32 (rows, values) of the output tensor `name`. Raises ValueError where there is none."""
    names = [output.name for output in response.outputs]
    if name not in names:
        raise ValueError(f"no output {name!r} among {names}")
    at = names.index(name)
    if response.outputs[at].datatype != "FP32":
        raise ValueError(f"output {name!r} must be FP32, got {response.outputs[at].datatype!r}")
    return np.frombuffer(response.raw_output_contents[at], "<f4").reshape(rows, -1)
