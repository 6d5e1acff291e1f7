"""The inference service over real gRPC, on both transports, with real ONNX models."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from google.rpc import error_details_pb2, status_pb2

from services.inference.batcher import Limits
from services.inference.onnx import OnnxRuntime
from services.inference.repository import Repository
from services.inference.service import NAME as SERVICE
from services.inference.service import InferenceService, offer
from services.mesh.serve import Server
from tenfold.inference.v2 import inference_pb2 as pb
from tenfold.inference.v2 import inference_pb2_grpc as pb_grpc

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
MLP = (
    HEAD
    + """mlp (float[N,50] features) => (float[N,1] late_probability)
    <float[50,16] w0, float[16] b0, float[16,1] w1>
    { h = MatMul(features, w0) c = Add(h, b0) a = Relu(c) z = MatMul(a, w1) late_probability = Sigmoid(z) }"""
)
PICK = (
    HEAD
    + "pick (int64[N,1] at) => (float[N,1] y, int64[N,1] same) <float[3] t = {1, 2, 3}> "
    + "{ y = Gather(t, at) same = Identity(at) }"
)
TEXT = HEAD + "text (string[N,2] words) => (string[N,2] same) { same = Identity(words) }"
FIXED = HEAD + "fixed (float[3] x) => (float[3] y) { y = Neg(x) }"
STEPS = 150
SLOW = (
    HEAD
    + "slow (float[N,1024] x0) => (float[N,1] y) {"
    + "size = Constant <value = int64[2] {1024, 1024}> () w = ConstantOfShape <value = float[1] {0.0001}> (size)"
    + " ".join(f"x{i + 1} = MatMul(x{i}, w)" for i in range(STEPS))
    + f"y = ReduceMax <axes = [1], keepdims = 1> (x{STEPS}) }}"
)


def write(root: Path, name: str, text: str, version: int = 1, **properties: str) -> None:
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(3)
    for weight in model.graph.value_info:  # weights that the text declares without values
        shape = [size.dim_value for size in weight.type.tensor_type.shape.dim]
        values = random.standard_normal(shape, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, weight.name))
    del model.graph.value_info[:]
    onnx.helper.set_model_props(model, properties)
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")


class Client:
    """A served repository and a stub that calls it."""

    def __init__(self, root: Path, repository: Repository, channel: grpc.aio.Channel) -> None:
        self.root, self.repository, self.channel = root, repository, channel
        self.stub: pb_grpc.GRPCInferenceServiceAsyncStub = pb_grpc.GRPCInferenceServiceStub(channel)

    async def statistics(self, name: str) -> pb.ModelStatistics:
        return (await self.stub.ModelStatistics(pb.ModelStatisticsRequest(name=name))).model_stats[0]

    async def waiting(self, name: str, count: int) -> None:
        """Returns when so many calls wait behind the run that is under way."""
        while len(self.repository.find(name).runner) != count:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(transport: str, root: Path, limits: Limits) -> AsyncIterator[Client]:
    repository = Repository(root, OnnxRuntime(["cpu"]).load, limits)
    await repository.refresh()
    folder = tempfile.TemporaryDirectory(prefix="tf")
    address = f"unix:{folder.name}/inference.sock"
    server = Server(address, [offer(InferenceService(repository))], transport)
    await server.start()
    await server.ready()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Client(root, repository, channel)
    finally:
        await server.stop(lame_duck_s=0, grace_s=1)
        await repository.close()
        folder.cleanup()


@pytest.fixture(params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client(transport: str, tmp_path: Path) -> AsyncIterator[Client]:
    write(tmp_path, "mlp", MLP, version=3, **{"tenfold.columns": '["input.x"]'})
    write(tmp_path, "pick", PICK)
    write(tmp_path, "text", TEXT)
    write(tmp_path, "fixed", FIXED)
    (tmp_path / "corrupt" / "1").mkdir(parents=True)
    (tmp_path / "corrupt" / "1" / "model.onnx").write_bytes(b"garbage" * 40)
    async with serving(transport, tmp_path, Limits(max_rows=16)) as client:
        yield client


@pytest.fixture
async def slow(transport: str, tmp_path: Path) -> AsyncIterator[Client]:
    """A model whose run takes long enough for other calls to arrive meanwhile."""
    write(tmp_path, "slow", SLOW)
    async with serving(transport, tmp_path, Limits(max_rows=8, max_run_s=60, max_waiting=4)) as client:
        yield client


def infer(model: str, *tensors: tuple[str, str, np.ndarray[Any, Any]], **more: Any) -> pb.ModelInferRequest:
    raws = [array.tobytes() for *_, array in tensors]
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=raws, **more)
    for name, datatype, array in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    return request


def features(rows: int = 1, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, 50), np.float32)


def slow_request(rows: int = 1) -> pb.ModelInferRequest:
    return infer("slow", ("x0", "FP32", np.ones((rows, 1024), np.float32)))


async def test_answers_equal_those_of_the_model_itself(client: Client) -> None:
    x = features(5)
    answer = await client.stub.ModelInfer(infer("mlp", ("features", "FP32", x), id="42"))
    expected = ort.InferenceSession(client.root / "mlp/3/model.onnx").run(None, {"features": x})[0]
    assert (answer.model_name, answer.model_version, answer.id) == ("mlp", "3", "42")
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [("late_probability", "FP32", [5, 1])]
    got = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(5, 1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


async def test_concurrent_calls_get_their_own_answers(client: Client) -> None:
    x = features(64)
    asked = (client.stub.ModelInfer(infer("mlp", ("features", "FP32", row[None]))) for row in x)
    answers = await asyncio.gather(*asked)
    expected = ort.InferenceSession(client.root / "mlp/3/model.onnx").run(None, {"features": x})[0]
    got = [np.frombuffer(answer.raw_output_contents[0], np.float32)[0] for answer in answers]
    np.testing.assert_allclose(got, expected[:, 0], rtol=1e-5)


async def test_typed_contents_are_answered_raw(client: Client) -> None:
    request = pb.ModelInferRequest(model_name="pick")
    request.inputs.add(name="at", datatype="INT64", shape=[2, 1]).contents.int64_contents.extend([2, 0])
    answer = await client.stub.ModelInfer(request)
    assert list(answer.raw_output_contents) == [
        np.array([3, 1], np.float32).tobytes(),
        np.array([2, 0], np.int64).tobytes(),
    ]


async def test_text_travels_both_ways(client: Client) -> None:
    packed = b"\x01\x00\x00\x00a\x02\x00\x00\x00\xc3\xa9"
    request = pb.ModelInferRequest(model_name="text", raw_input_contents=[packed])
    request.inputs.add(name="words", datatype="BYTES", shape=[1, 2])
    assert list((await client.stub.ModelInfer(request)).raw_output_contents) == [packed]


async def test_a_model_without_a_batch_dimension_is_served(client: Client) -> None:
    x = np.array([1, 2, 3], np.float32)
    answers = await asyncio.gather(*(client.stub.ModelInfer(infer("fixed", ("x", "FP32", x * n))) for n in range(4)))
    for n, answer in enumerate(answers):
        np.testing.assert_array_equal(np.frombuffer(answer.raw_output_contents[0], np.float32), -x * n)


async def test_only_the_outputs_that_were_asked_for_come_back(client: Client) -> None:
    request = infer("pick", ("at", "INT64", np.array([[1]], np.int64)))
    request.outputs.add(name="same")
    answer = await client.stub.ModelInfer(request)
    assert [output.name for output in answer.outputs] == ["same"]
    assert list(answer.raw_output_contents) == [np.array([1], np.int64).tobytes()]


async def test_nan_is_a_feature_value(client: Client) -> None:
    x = features()
    x[0, 3] = np.nan
    answer = await client.stub.ModelInfer(infer("mlp", ("features", "FP32", x)))
    assert len(answer.raw_output_contents[0]) == 4


async def test_one_bad_index_fails_alone_among_its_neighbours(client: Client) -> None:
    places = [0, 1, 99, 2]
    asked = (client.stub.ModelInfer(infer("pick", ("at", "INT64", np.array([[at]], np.int64)))) for at in places)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    bad = answers.pop(2)
    assert isinstance(bad, grpc.aio.AioRpcError)
    assert bad.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "out of data bounds" in str(bad.details())
    assert [np.frombuffer(a.raw_output_contents[0], np.float32)[0] for a in answers] == [1, 2, 3]  # type: ignore[union-attr]


def both_contents() -> pb.ModelInferRequest:
    request = infer("mlp", ("features", "FP32", features()))
    request.inputs[0].contents.fp32_contents.extend([0.0] * 50)
    return request


def short_by_a_byte() -> pb.ModelInferRequest:
    request = infer("mlp", ("features", "FP32", features()))
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
    return request


def unknown_output() -> pb.ModelInferRequest:
    request = infer("mlp", ("features", "FP32", features()))
    request.outputs.add(name="late")
    return request


X = features()
INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (infer("nope", ("features", "FP32", X)), MISSING, "no model 'nope'; there are fixed, mlp, pick, text"),
        (infer("../mlp", ("features", "FP32", X)), MISSING, "no model '../mlp'"),
        (infer("mlp", ("features", "FP32", X), model_version="1"), MISSING, "no version '1' here"),
        (infer("mlp", ("features", "FP32", X), model_version="../3"), MISSING, "no version '../3' here"),
        (infer("corrupt", ("x", "FP32", X)), grpc.StatusCode.UNAVAILABLE, "model 'corrupt' is not ready"),
        (infer("mlp"), INVALID, "features: this input is missing"),
        (infer("mlp", ("feature", "FP32", X)), INVALID, "inputs[0].name: must be one of features, got 'feature'"),
        (
            infer("mlp", ("features", "FP32", X), ("more", "FP32", X)),
            INVALID,
            "inputs[1].name: must be one of features, got 'more'",
        ),
        (infer("mlp", ("features", "FP64", X)), INVALID, "features.datatype: must be FP32, got 'FP64'"),
        (infer("mlp", ("features", "FP32", X[:, :49])), INVALID, "features.shape: must be [-1, 50] where -1 is any"),
        (infer("mlp", ("features", "FP32", X[0])), INVALID, "got [50]"),
        (infer("mlp", ("features", "FP32", X[:0])), INVALID, "must have at least 1 in every dimension, got [0, 50]"),
        (infer("mlp", ("features", "FP32", features(17))), INVALID, "must have at most 16 rows, got 17"),
        (short_by_a_byte(), INVALID, "features.raw_input_contents: must be 200 bytes for 50 values of FP32, got 199"),
        (both_contents(), INVALID, "features.contents: must be empty where raw_input_contents is used"),
        (unknown_output(), INVALID, "outputs[0].name: must be one of late_probability, got 'late'"),
    ],
)
async def test_bad_input_is_named_and_harms_nobody(
    client: Client, request_: pb.ModelInferRequest, code: grpc.StatusCode, message: str
) -> None:
    bad = client.stub.ModelInfer(request_)
    good = client.stub.ModelInfer(infer("mlp", ("features", "FP32", X)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bad
    assert caught.value.code() == code
    assert message in str(caught.value.details())
    assert len((await good).raw_output_contents[0]) == 4
    assert (await client.stub.ServerLive(pb.ServerLiveRequest())).live


async def test_bad_input_carries_its_field_violations(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.stub.ModelInfer(infer("mlp", ("features", "FP64", X)))
    trailers = dict(tuple(caught.value.trailing_metadata() or ()))
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])  # type: ignore[arg-type]
    detail = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(detail)
    assert detail.field_violations[0].field == "features.datatype"


async def test_a_model_tells_its_shape_its_columns_and_what_runs_it(client: Client) -> None:
    config = (await client.stub.ModelConfig(pb.ModelConfigRequest(name="mlp"))).config
    assert (config.name, config.platform, config.backend, config.max_batch_size) == (
        "mlp",
        "onnxruntime_onnx",
        "onnxruntime",
        16,
    )
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("features", pb.TYPE_FP32, [50])]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [("late_probability", pb.TYPE_FP32, [1])]
    assert config.parameters["tenfold.columns"].string_value == '["input.x"]'
    assert config.parameters["tenfold.provider"].string_value == "CPUExecutionProvider"
    metadata = await client.stub.ModelMetadata(pb.ModelMetadataRequest(name="mlp"))
    assert (metadata.platform, list(metadata.versions)) == ("onnxruntime_onnx", ["3"])
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("features", "FP32", [-1, 50])]


async def test_a_model_without_a_batch_dimension_says_so(client: Client) -> None:
    config = (await client.stub.ModelConfig(pb.ModelConfigRequest(name="fixed"))).config
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [3])


async def test_the_server_tells_what_is_ready_and_why_the_rest_is_not(client: Client) -> None:
    assert (await client.stub.ServerReady(pb.ServerReadyRequest())).ready
    for name, version, ready in (("mlp", "", True), ("mlp", "3", True), ("mlp", "4", False), ("nope", "", False)):
        answer = await client.stub.ModelReady(pb.ModelReadyRequest(name=name, version=version))
        assert answer.ready == ready
    index = (await client.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    states = {model.name: (model.state, model.reason) for model in index}
    assert states["mlp"] == ("READY", "")
    assert states["corrupt"][0] == "UNAVAILABLE"
    assert "Protobuf parsing failed" in states["corrupt"][1]
    ready = (await client.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models
    assert "corrupt" not in {model.name for model in ready}
    server = await client.stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (server.name, list(server.extensions)) == ("tenfold", ["model_configuration", "statistics"])


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics"])
async def test_an_unknown_model_is_not_found(client: Client, method: str) -> None:
    request = getattr(pb, f"{method}Request")(name="nope")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(client.stub, method)(request)
    assert caught.value.code() == MISSING


async def test_what_is_not_offered_is_unimplemented(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_stream_answers_each_request_and_survives_a_bad_one(client: Client) -> None:
    requests = [
        infer("mlp", ("features", "FP32", X), id="first"),
        infer("mlp", ("features", "FP64", X), id="bad"),
        infer("mlp", ("features", "FP32", X), id="last"),
    ]
    answers = [answer async for answer in client.stub.ModelStreamInfer(iter(requests))]
    assert [answer.infer_response.id for answer in answers] == ["first", "bad", "last"]
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    assert "features.datatype" in answers[1].error_message
    assert answers[0].infer_response.raw_output_contents == answers[2].infer_response.raw_output_contents


async def test_bytes_that_are_no_message_are_the_callers_fault(client: Client) -> None:
    unary = client.channel.unary_unary(f"/{SERVICE}/ModelInfer")
    stream = client.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
    with pytest.raises(grpc.aio.AioRpcError, match=r"inference\.ModelInferRequest") as refused:
        await unary(b"\x0a\xff", timeout=20)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError, match=r"inference\.ModelInferRequest") as ended:
        [answer async for answer in stream(iter([b"\x0a\xff"]), timeout=20)]
    assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_refusal_that_quotes_a_megabyte_still_arrives(client: Client) -> None:
    request = infer("mlp", ("features", "FP32", X))
    request.inputs[0].datatype = "F" * 1_000_000
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.stub.ModelInfer(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.value.details() or "").startswith("features.datatype: must be FP32, got 'FFF")


async def test_calls_that_queue_behind_a_run_share_the_next_ones(slow: Client) -> None:
    asked = [slow.stub.ModelInfer(slow_request()) for _ in range(4)]
    await asyncio.gather(*asked)
    kept = await slow.statistics("slow")
    assert kept.inference_count == 4
    assert kept.execution_count < 4
    assert sum(batch.batch_size * batch.compute_infer.count for batch in kept.batch_stats) == 4
    assert kept.inference_stats.success.count == kept.inference_stats.queue.count == 4
    assert 0 < kept.inference_stats.compute_infer.ns <= kept.inference_stats.success.ns


async def test_a_deadline_that_cannot_hold_ends_before_any_work(slow: Client) -> None:
    slow.repository.find("slow").runner._batcher.estimate.fixed_s = 100.0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await slow.stub.ModelInfer(slow_request(), timeout=20)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "an answer takes about 100" in str(caught.value.details())
    assert (await slow.statistics("slow")).execution_count == 0


async def test_the_timeout_parameter_is_a_deadline_too(slow: Client) -> None:
    slow.repository.find("slow").runner._batcher.estimate.fixed_s = 100.0
    request = slow_request()
    request.parameters["timeout"].int64_param = 2_000_000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await slow.stub.ModelInfer(request)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_cancelled_call_leaves_the_queue_and_never_runs(slow: Client) -> None:
    first = slow.stub.ModelInfer(slow_request())
    await slow.stub.ServerLive(pb.ServerLiveRequest())  # the first is under way
    gone = slow.stub.ModelInfer(slow_request(rows=5))
    await slow.waiting("slow", 1)
    gone.cancel()
    await slow.waiting("slow", 0)
    await first
    await slow.stub.ModelInfer(slow_request())
    assert (await slow.statistics("slow")).inference_count == 2


async def test_a_full_queue_sheds_with_pushback(slow: Client, transport: str) -> None:
    asked = [slow.stub.ModelInfer(slow_request()) for _ in range(12)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    shed = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert shed
    assert len(answers) - len(shed) >= 4
    for error in shed:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(tuple(error.trailing_metadata() or ()))
        if transport == "grpcio":  # the native front cannot send it
            assert int(trailers["grpc-retry-pushback-ms"]) > 0
        assert trailers["x-shed-reason"] == "queue_full"


async def started_first(client: Client, late: Callable[[], Any], early: Callable[[], Any]) -> list[str]:
    """In which order two calls are answered that wait behind the same run, `late` having arrived first."""
    order: list[str] = []

    async def note(name: str, call: Any) -> None:
        await call
        order.append(name)

    runner = client.repository.find("slow").runner
    runner._batcher.limits = Limits(max_rows=1)
    first = client.stub.ModelInfer(slow_request())
    await client.stub.ServerLive(pb.ServerLiveRequest())
    one = asyncio.create_task(note("late", late()))
    await client.waiting("slow", 1)
    two = asyncio.create_task(note("early", early()))
    await client.waiting("slow", 2)
    await asyncio.gather(first, one, two)
    return order


async def test_a_higher_priority_goes_first(slow: Client) -> None:
    def call(label: str) -> Any:
        return slow.stub.ModelInfer(slow_request(), metadata=(("x-priority", label),))

    assert await started_first(slow, lambda: call("background"), lambda: call("critical")) == ["early", "late"]


async def test_a_clients_own_priority_does_not_overrule_the_stamp(slow: Client) -> None:
    def call(label: str, level: int) -> Any:
        request = slow_request()
        request.parameters["priority"].uint64_param = level
        return slow.stub.ModelInfer(request, metadata=(("x-priority", label),))

    order = await started_first(slow, lambda: call("critical", 3), lambda: call("background", 1))
    assert order == ["late", "early"]


async def test_without_a_stamp_the_priority_parameter_counts(slow: Client) -> None:
    def call(level: int) -> Any:
        request = slow_request()
        request.parameters["priority"].uint64_param = level
        return slow.stub.ModelInfer(request)

    assert await started_first(slow, lambda: call(3), lambda: call(1)) == ["early", "late"]


async def test_a_new_version_takes_over_while_calls_are_under_way(client: Client) -> None:
    request = infer("mlp", ("features", "FP32", X))
    write(client.root, "mlp", MLP, version=4)
    refreshing = asyncio.create_task(client.repository.refresh())
    versions = []
    while not refreshing.done():
        versions.append((await client.stub.ModelInfer(request)).model_version)
    versions.append((await client.stub.ModelInfer(request)).model_version)
    assert versions == sorted(versions)
    assert versions[-1] == "4"
