"""ONNX Runtime behind the backend's shape. Models are written in ONNX's own text form."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from services.inference.backend import InputFault, LoadError
from services.inference.onnx import PROVIDERS, OnnxBackend, OnnxRuntime, Options, usable, why_no_cuda, why_not

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
SIGMOID = (
    HEAD
    + "logistic (float[N,2] features) => (float[N,1] p) <float[2,1] w = {1, -1}> "
    + "{ z = MatMul(features, w) p = Sigmoid(z) }"
)

NO_GPU = why_no_cuda()
needs_gpu = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU or "-")


def write(folder: Path, text: str, **properties: str) -> Path:
    model = onnx.parser.parse_model(text)
    onnx.helper.set_model_props(model, properties)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., OnnxBackend]:
    def load(text: str, **properties: str) -> OnnxBackend:
        return OnnxRuntime(["cpu"]).load(write(tmp_path, text, **properties))

    return load


def test_a_model_runs_and_says_what_it_is(load: Callable[..., OnnxBackend]) -> None:
    backend = load(SIGMOID, **{"tenfold.columns": '["a.x", "a.y"]'})
    x = np.array([[1, 1], [3, 1]], np.float32)
    np.testing.assert_allclose(backend.run({"features": x})[0], [[0.5], [1 / (1 + np.exp(-2))]], rtol=1e-6)
    assert backend.provider == "CPUExecutionProvider"
    assert backend.metadata == {"tenfold.columns": '["a.x", "a.y"]'}
    assert [(spec.name, spec.datatype.name, spec.shape) for spec in (*backend.inputs, *backend.outputs)] == [
        ("features", "FP32", (-1, 2)),
        ("p", "FP32", (-1, 1)),
    ]


def test_text_goes_in_and_out(load: Callable[..., OnnxBackend]) -> None:
    backend = load(HEAD + "same (string[N] x) => (string[N] y) { y = Identity(x) }")
    assert backend.run({"x": np.array(["a", "é"], object)})[0].tolist() == ["a", "é"]


def test_bfloat16_goes_in_and_out_as_its_bits(load: Callable[..., OnnxBackend]) -> None:
    backend = load(HEAD + "same (bfloat16[N] x) => (bfloat16[N] y) { z = Cast <to = 1> (x) y = Cast <to = 16> (z) }")
    bits = np.array([0x3F80, 0xC000], np.uint16)  # 1.0 and -2.0
    np.testing.assert_array_equal(backend.run({"x": bits})[0], bits)


def test_an_input_the_graph_cannot_stand_is_the_inputs_fault(load: Callable[..., OnnxBackend]) -> None:
    backend = load(HEAD + "pick (int64[N] at) => (float[N] y) <float[2] t = {1, 2}> { y = Gather(t, at) }")
    with pytest.raises(InputFault, match="out of data bounds"):
        backend.run({"at": np.array([7], np.int64)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Load model from model.onnx failed:No graph was found"),
        (b"garbage" * 40, "INVALID_PROTOBUF"),
        (onnx.parser.parse_model(SIGMOID).SerializeToString()[:-20], "INVALID_PROTOBUF|INVALID_GRAPH|FAIL"),
    ],
)
def test_a_file_that_is_no_model_is_refused_with_a_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        OnnxRuntime(["cpu"]).load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '<ir_version: 8, opset_import: ["" : 17, "evil" : 1]> g (float[N] x) => (float[N] y) { y = evil.Op(x) }',
            "evil",
        ),
        (HEAD + "g (complex64[N] x) => (complex64[N] y) { y = Identity(x) }", "complex64"),
        (HEAD + "g (seq(float[N]) x) => (seq(float[N]) y) { y = Identity(x) }", "only tensors of BOOL"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_with_a_reason(
    load: Callable[..., OnnxBackend], text: str, message: str
) -> None:
    with pytest.raises(LoadError, match=message):
        load(text)


def test_a_library_of_custom_operators_is_never_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, SIGMOID)
    (tmp_path / "ops.so").write_bytes(b"")
    with pytest.raises(LoadError, match=r"ops\.so lies beside it"):
        OnnxRuntime(["cpu"]).load(path)


def test_weights_outside_the_models_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    folder = tmp_path / "1"
    folder.mkdir()
    model = onnx.parser.parse_model(SIGMOID)
    weight = model.graph.initializer[0]
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(LoadError):
        OnnxRuntime(["cpu"]).load(path)


def test_providers_that_are_not_here_are_left_out_in_order() -> None:
    missing = {"tensorrt": "not installed"}
    assert usable(["tensorrt", "cuda", "cpu"], lambda provider: missing.get(provider, "")) == ["cuda", "cpu"]
    with pytest.raises(ValueError, match="no execution provider can be used: tensorrt: not installed"):
        usable(["tensorrt"], lambda provider: missing.get(provider, ""))


class Driver:
    """As much of the NVIDIA driver as is asked."""

    def __init__(self, status: int, devices: int) -> None:
        self._status, self._devices = status, devices

    def cuInit(self, flags: int) -> int:
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._devices
        return 0


def test_the_driver_says_whether_there_is_a_device() -> None:
    def absent(name: str) -> ctypes.CDLL:
        raise OSError(name)

    assert why_no_cuda(absent) == "no NVIDIA driver: libcuda.so.1 not found"
    assert why_no_cuda(lambda _: Driver(100, 0)) == "the NVIDIA driver answers with error 100"
    assert why_no_cuda(lambda _: Driver(0, 0)) == "the NVIDIA driver finds no device"
    assert why_no_cuda(lambda _: Driver(0, 1)) == ""


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_machine_without_cuda_starts_without_noise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backend = OnnxRuntime(["tensorrt", "cuda", "cpu"]).load(write(tmp_path, SIGMOID))
    assert backend.provider == "CPUExecutionProvider"
    assert capfd.readouterr() == ("", "")


def test_options_become_those_of_each_provider(tmp_path: Path) -> None:
    options = Options(cuda_memory_bytes=2**30, tensorrt_cache=str(tmp_path), tensorrt_fp16=True)
    assert options.of("cuda")["gpu_mem_limit"] == "1073741824"
    assert options.of("cuda")["arena_extend_strategy"] == "kSameAsRequested"
    assert options.of("tensorrt")["trt_engine_cache_path"] == str(tmp_path)
    assert options.of("tensorrt")["trt_fp16_enable"] == "1"
    assert options.of("cpu") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be from 1 to 256, got 0"),
        ({"cuda_memory_bytes": -1}, "must be at least 0, got 0, -1"),
        ({"tensorrt_cache": "/nowhere"}, "the TensorRT cache must be a folder, got '/nowhere'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_gives_the_same_answers_and_says_so(tmp_path: Path, provider: str) -> None:
    if why := why_not(provider):
        pytest.skip(why)
    path = write(tmp_path, SIGMOID)
    backend = OnnxRuntime([provider, "cpu"], Options(cuda_memory_bytes=2**30)).load(path)
    x = np.random.default_rng(1).standard_normal((5, 2), np.float32)
    expected = OnnxRuntime(["cpu"]).load(path).run({"features": x})[0]
    np.testing.assert_allclose(backend.run({"features": x})[0], expected, atol=1e-3)
    assert backend.provider == PROVIDERS[provider]
