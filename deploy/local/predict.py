"""tenfold predict: one real prediction through the gateway, told to a person."""

from __future__ import annotations

import datetime
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from deploy.local.folders import option
from deploy.local.state import StackError, State
from services.mesh import attributes
from services.mesh.context import Metadata, sampled_traceparent
from services.resilience.call import Priority
from tenfold.common.v1 import call_pb2
from tenfold.feature.v1 import feature_pb2, feature_pb2_grpc
from tenfold.router.v1 import router_pb2, router_pb2_grpc

if TYPE_CHECKING:
    from deploy.flights.replay import Flight

EXAMPLE = "UA1216"  # leaves every day, so its features are as fresh as they get
_ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back. took_ms: as the client saw it. trace: the id under which its spans are kept."""

    response: router_pb2.PredictResponse
    took_ms: float
    trace: str


def flight(state: State, designator: str) -> Flight:
    """The next departure of a flight after what the feature store has counted. Raises StackError for an unknown one."""
    from deploy.flights import replay

    if state.mesh != "flights":
        raise StackError(f"mesh {state.mesh!r} knows no flights; --flight is for the flights demonstration")
    moment_us = watermark_us(state)
    found = replay.next_departure(Path(state.home), designator.upper(), moment_us)
    if found is None:
        raise StackError(f"no flight {designator!r} leaves New York after {_moment(moment_us)}; try {EXAMPLE}")
    return found


def watermark_us(state: State) -> int:
    """Up to when the stored features have counted what happened, microseconds since 1970 UTC."""
    with grpc.insecure_channel(state.addresses("feature")[0]) as channel:
        stub = feature_pb2_grpc.FeatureServiceStub(channel)
        try:
            views = stub.DescribeViews(feature_pb2.DescribeViewsRequest(), timeout=_ASK_TIMEOUT_S).views
        except grpc.RpcError as error:
            raise StackError(f"the feature service does not answer: {_said(error)}") from None
    if not views:
        raise StackError("the feature store holds no views yet")
    return max(view.watermark_us for view in views)


def ask(address: str, request: router_pb2.PredictRequest, priority: Priority, timeout_ms: float) -> Answered:
    """One call through the gateway, always traced. Raises StackError with the status where it fails."""
    traceparent = sampled_traceparent()
    trace = traceparent.split("-")[1]
    metadata: Metadata = ((attributes.PRIORITY, priority.label), (attributes.TRACEPARENT, traceparent))
    with grpc.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        began = time.perf_counter()
        try:
            response = stub.Predict(request, timeout=timeout_ms / 1000, metadata=metadata)
        except grpc.RpcError as error:
            raise StackError(f"{address}: {_said(error)} (trace {trace})") from None
        return Answered(response, (time.perf_counter() - began) * 1000, trace)


def as_json(found: Flight, answered: Answered) -> str:
    response = answered.response
    told: dict[str, Any] = {
        "flight": found.designator,
        "predict_at_us": found.predict_at_us,
        "outputs": {output.name: list(output.values) for output in response.outputs},
        "tier": response.served_by.tier,
        "model": response.served_by.model,
        "model_version": response.served_by.model_version,
        "provider": response.served_by.provider,
        "degraded": response.HasField("degradation"),
        "cost_usd": response.cost_usd,
        "took_ms": round(answered.took_ms, 3),
        "trace": answered.trace,
    }
    if response.HasField("degradation"):
        told["degradation"] = {
            "reason": _reason(response),
            "detail": response.degradation.detail,
            "source": response.degradation.source,
            "age_s": response.degradation.age_s,
        }
    if response.HasField("features"):
        names = ("max_age_s", "ok", "null", "missing", "expired")
        told["features"] = {name: getattr(response.features, name) for name in names}
    return json.dumps(told, indent=2)


def as_text(found: Flight, answered: Answered, stack: str) -> str:
    """The same for a person. stack: where its trace is kept."""
    response, entities = answered.response, found.entities
    probability = next((output.values[0] for output in response.outputs if output.values), float("nan"))
    by = response.served_by
    served = f"{by.tier} tier: {by.model} version {by.model_version} on {by.provider}" if by.tier else by.model or "-"
    rows = [
        (
            "flight",
            f"{found.designator} {entities['origin']} to {entities['dest']}, asked {_moment(found.predict_at_us)}",
        ),
        ("late", f"{probability:.1%} likely to be 15 minutes late or more, cancelled or diverted"),
        ("served by", served),
        ("degraded", _degradation(response)),
        ("features", _features(response)),
        ("cost", f"${response.cost_usd * 1000:.4f} per 1,000"),
        ("took", f"{answered.took_ms:.1f} ms"),
        ("trace", f"{answered.trace}  (tenfold traces show {answered.trace[:8]}{option(stack)})"),
    ]
    return "\n".join(f"{name:<10} {value}" for name, value in rows)


def _degradation(response: router_pb2.PredictResponse) -> str:
    if not response.HasField("degradation"):
        return "no"
    why = response.degradation
    age = f", {_age(why.age_s)} old" if why.age_s > 0 else ""
    return f"yes, {_reason(response)}: {why.detail or 'no detail'} (answered by {why.source}{age})"


def _features(response: router_pb2.PredictResponse) -> str:
    if not response.HasField("features"):
        return "none were read"
    worth = response.features
    counts = ", ".join(f"{getattr(worth, name)} {name}" for name in ("ok", "null", "missing", "expired"))
    return f"{counts}; the oldest {_age(worth.max_age_s)} old"


def _reason(response: router_pb2.PredictResponse) -> str:
    return call_pb2.Reason.Name(response.degradation.reason).removeprefix("REASON_").lower()


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _moment(us: int) -> str:
    return datetime.datetime.fromtimestamp(us / 1e6, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _said(error: grpc.RpcError) -> str:
    code, details = error.code(), error.details()
    return f"{code.name}: {details}"


def run(state: State, designator: str, priority: Priority, timeout_ms: float, *, json_wanted: bool) -> None:
    """The whole command. Raises StackError."""
    from deploy.flights.ask import request_of

    found = flight(state, designator)
    answered = ask(state.topology.ingress, request_of(found), priority, timeout_ms)
    told = as_json(found, answered) if json_wanted else as_text(found, answered, state.stack)
    sys.stdout.write(told + "\n")
