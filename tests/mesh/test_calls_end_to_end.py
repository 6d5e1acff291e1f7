"""Deadlines, cancellation and bad input through every hop of a real mesh."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from deploy.flights.ask import request_of
from tenfold.common.v1.call_pb2 import Reason
from tenfold.inference.v2 import inference_pb2, inference_pb2_grpc
from tenfold.router.v1 import router_pb2, router_pb2_grpc

if TYPE_CHECKING:
    from conftest import Stack

pytestmark = pytest.mark.mesh

CRITICAL = (("x-priority", "critical"),)
SLACK_S = 5.0
"""How late a test may notice that something ended: generous, as the machine may be busy. What is asserted is that calls
end by their deadlines at all, not how fast this machine is."""


@pytest.fixture(scope="module")
def channel(stack: Stack) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(stack.state.topology.ingress) as channel:
        yield channel


@pytest.fixture(scope="module")
def router(channel: grpc.Channel) -> router_pb2_grpc.RouterServiceStub:
    return router_pb2_grpc.RouterServiceStub(channel)


@contextmanager
def frozen(stack: Stack, *replicas: str) -> Iterator[None]:
    """The processes hang as if their machine did: connections stay open, nothing is answered."""
    pids = [stack.row(replica).pid for replica in replicas]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def whole(stack: Stack, router: router_pb2_grpc.RouterServiceStub, flight: Any) -> None:
    """Waits until answers are not degraded any more, so that the next test begins with a healthy mesh."""

    def not_degraded() -> bool:
        try:
            answer = router.Predict(request_of(flight), timeout=2, metadata=CRITICAL)
        except grpc.RpcError:
            return False
        return not answer.HasField("degradation")

    stack.wait("answers are whole again", not_degraded)


@pytest.mark.parametrize("replica", ["feature-0", "inference-0"])
def test_a_callee_that_hangs_costs_quality_and_not_the_deadline(
    stack: Stack, router: router_pb2_grpc.RouterServiceStub, flight: Any, replica: str
) -> None:
    with frozen(stack, replica):
        answer = router.Predict(request_of(flight), timeout=1.0, metadata=CRITICAL)
    assert answer.HasField("degradation")
    assert answer.degradation.reason != Reason.REASON_UNSPECIFIED
    assert answer.outputs[0].values
    whole(stack, router, flight)


def test_a_router_that_hangs_is_passed_over_by_the_gateway(
    stack: Stack, router: router_pb2_grpc.RouterServiceStub, flight: Any
) -> None:
    with frozen(stack, "router-0"):

        def answered_by_fallback() -> bool:
            try:
                answer = router.Predict(request_of(flight), timeout=1.0, metadata=CRITICAL)
            except grpc.RpcError as error:  # until the health check has noticed
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # noqa: PT017 - nothing else may happen
                return False
            return bool(answer.degradation.reason == Reason.REASON_ROUTER_UNREACHABLE)

        stack.wait("fallback answers for the router", answered_by_fallback)
    whole(stack, router, flight)


def test_the_deadline_ends_a_call_that_nobody_can_answer(
    stack: Stack, router: router_pb2_grpc.RouterServiceStub, flight: Any
) -> None:
    with frozen(stack, "inference-0", "fallback-0"):
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as ended:
            router.Predict(request_of(flight), timeout=0.5, metadata=CRITICAL)
        took_s = time.monotonic() - began
    assert ended.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
    assert took_s < 0.5 + SLACK_S
    whole(stack, router, flight)


def active(stack: Stack) -> dict[str, int]:
    """Calls that the gateway has under way, by where: the ingress, the egress, and each cluster behind them."""
    address = stack.state.topology.admin
    with urllib.request.urlopen(f"http://{address}/stats?filter=rq_active$", timeout=5) as page:
        text = page.read().decode()
    found = re.findall(r"^(\S+)\.\w*rq_active: (\d+)$", text, re.MULTILINE)
    return {where: int(count) for where, count in found if "admin" not in where and int(count)}


def test_a_call_that_its_client_cancels_is_cancelled_everywhere(
    stack: Stack, router: router_pb2_grpc.RouterServiceStub, flight: Any
) -> None:
    stack.wait("nothing is under way", lambda: not active(stack))
    with frozen(stack, "feature-0"):
        call = router.Predict.future(request_of(flight), timeout=60, metadata=CRITICAL)
        stack.wait(
            "the call has reached the feature service", lambda: any("feature" in where for where in active(stack))
        )
        call.cancel()
        # the feature service still hangs, and its minute is not over: what ends the call is the cancellation
        stack.wait("no hop holds the call any more", lambda: not active(stack), within_s=20)
    whole(stack, router, flight)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"model": ""}, grpc.StatusCode.INVALID_ARGUMENT, "model"),
        ({"model": "flight_dealy"}, grpc.StatusCode.NOT_FOUND, "flight_dealy"),
        ({"tier": "huge"}, grpc.StatusCode.NOT_FOUND, "huge"),
        ({"request_id": "x" * 129}, grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
        ({"as_of_us": -1}, grpc.StatusCode.INVALID_ARGUMENT, "as_of_us"),
        ({"entities": {"origin": ""}}, grpc.StatusCode.INVALID_ARGUMENT, "origin"),
    ],
)
def test_bad_input_is_named_and_is_nobodys_failure(
    stack: Stack,
    router: router_pb2_grpc.RouterServiceStub,
    flight: Any,
    change: dict[str, Any],
    code: grpc.StatusCode,
    message: str,
) -> None:
    request = request_of(flight)
    request.MergeFrom(router_pb2.PredictRequest(**change))
    if change.get("model") == "":
        request.ClearField("model")
    with pytest.raises(grpc.RpcError) as refused:
        router.Predict(request, timeout=2, metadata=CRITICAL)
    assert refused.value.code() is code
    assert message in refused.value.details()
    assert not router.Predict(request_of(flight), timeout=2, metadata=CRITICAL).HasField("degradation")


def test_kserve_clients_reach_the_models_through_the_same_gateway(channel: grpc.Channel) -> None:
    stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    config = stub.ModelConfig(inference_pb2.ModelConfigRequest(name="flight_delay_linear"), timeout=2).config
    width = config.input[0].dims[0]
    request = inference_pb2.ModelInferRequest(model_name="flight_delay_linear")
    request.inputs.add(name="features", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(bytes(4 * width))
    answer = stub.ModelInfer(request, timeout=2, metadata=CRITICAL)
    assert answer.outputs[0].name == "late_probability"
    assert list(answer.outputs[0].shape) == [1, 1]
