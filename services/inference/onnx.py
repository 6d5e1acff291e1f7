"""ONNX Runtime: which devices are here, how a model is loaded on them, how it runs.

Measured on a CPU with tree ensembles and small networks: one thread for each run is best up to some hundred rows
(a second thread only adds CPU time), and IO binding costs more than it saves, because every batch has new buffers.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from services.inference.backend import DeviceFault, InputFault, LoadError
from services.inference.tensors import DATATYPES, Array, TensorSpec

log = logging.getLogger(__name__)

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
LIBRARY_SUFFIXES = (".so", ".dll", ".dylib", ".pyd")
_FATAL = 4  # ONNX Runtime's log severity: what goes wrong is raised, and logged once, by us

_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float": "FP32",
    "double": "FP64",
    "bfloat16": "BF16",
    "string": "BYTES",
}
_LOAD_ERRORS = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.ModelLoadCanceled,
    errors.NoModel,
    errors.NoSuchFile,
    errors.NotImplemented,
    errors.RuntimeException,
    errors.EPFail,
    RuntimeError,
    ValueError,
)
_ON_THE_DEVICE = ("alloc", "out of memory", "cuda", "cudnn", "cublas", "tensorrt")


@dataclass(frozen=True, slots=True)
class Options:
    """threads: that one run may use; 1 runs on the thread that calls.

    device: which GPU. cuda_memory_bytes: the most the CUDA arena may hold; 0 for no limit.
    tensorrt_cache: folder for built engines, empty to build them at every start. tensorrt_fp16: allow half precision.
    """

    threads: int = 1
    device: int = 0
    cuda_memory_bytes: int = 0
    tensorrt_cache: str = ""
    tensorrt_fp16: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 256:
            raise ValueError(f"threads must be from 1 to 256, got {self.threads}")
        if self.device < 0 or self.cuda_memory_bytes < 0:
            raise ValueError(f"device and cuda memory must be at least 0, got {self.device}, {self.cuda_memory_bytes}")
        if self.tensorrt_cache and not Path(self.tensorrt_cache).is_dir():
            raise ValueError(f"the TensorRT cache must be a folder, got {self.tensorrt_cache!r}")

    def of(self, provider: str) -> dict[str, str]:
        """As ONNX Runtime wants them for one of `PROVIDERS`' keys."""
        if provider == "cuda":
            options = {"device_id": str(self.device), "arena_extend_strategy": "kSameAsRequested"}
            if self.cuda_memory_bytes:
                options["gpu_mem_limit"] = str(self.cuda_memory_bytes)
            return options
        if provider == "tensorrt":
            options = {"device_id": str(self.device), "trt_fp16_enable": str(int(self.tensorrt_fp16))}
            if self.tensorrt_cache:
                options |= {
                    "trt_engine_cache_enable": "1",
                    "trt_engine_cache_path": self.tensorrt_cache,
                    "trt_timing_cache_enable": "1",
                    "trt_timing_cache_path": self.tensorrt_cache,
                }
            return options
        return {}


def why_no_cuda(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """Why no NVIDIA device can be used, or empty where one can.

    Asked of the driver itself: the GPU wheel offers its providers everywhere, and complains loudly once they are used.
    """
    try:
        driver = load("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver: libcuda.so.1 not found"
    count = ctypes.c_int(0)
    if (status := driver.cuInit(0)) or (status := driver.cuDeviceGetCount(ctypes.byref(count))):
        return f"the NVIDIA driver answers with error {status}"
    return "" if count.value else "the NVIDIA driver finds no device"


def why_not(provider: str, load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """Why one of `PROVIDERS`' keys cannot be used on this machine, or empty."""
    if PROVIDERS[provider] not in ort.get_available_providers():
        return f"this build of ONNX Runtime has no {PROVIDERS[provider]}"
    if provider == "cpu":
        return ""
    if why := why_no_cuda(load):
        return why
    if provider == "tensorrt":
        try:
            load("libnvinfer.so.10")
        except OSError:
            return "TensorRT is not installed: libnvinfer.so.10 not found"
    return ""


def usable(wanted: Sequence[str], why: Callable[[str], str] = why_not) -> list[str]:
    """Those of `wanted` that this machine has, in the same order. Raises ValueError where none is left."""
    reasons = {provider: why(provider) for provider in wanted}
    for provider, reason in reasons.items():
        if reason:
            log.info("execution provider left out", extra={"provider": provider, "reason": reason})
    if left := [provider for provider, reason in reasons.items() if not reason]:
        return left
    raise ValueError("no execution provider can be used: " + "; ".join(f"{p}: {r}" for p, r in reasons.items()))


@functools.cache
def _share_arena() -> None:
    """One CPU arena for all sessions of this process, growing by what is asked: idle models hold no memory for runs."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


class OnnxRuntime:
    """Loads models. One per process: memory and threads are the process's own."""

    def __init__(self, providers: Sequence[str], options: Options | None = None) -> None:
        """providers: keys of `PROVIDERS`, most wanted first."""
        self._options = options or Options()
        self._providers = usable(providers)
        self._shares_threads = self._options.threads > 1
        if self._shares_threads:
            # every session of this process must use it from now on; with one thread there is no pool to share
            ort.set_global_thread_pool_sizes(self._options.threads, 1)
        ort.set_default_logger_severity(_FATAL)
        _share_arena()
        if "cuda" in self._providers or "tensorrt" in self._providers:
            ort.preload_dlls()

    def load(self, path: Path) -> OnnxBackend:
        """The model in a file. Raises LoadError saying why it cannot be served."""
        if libraries := sorted(file.name for file in path.parent.iterdir() if file.suffix in LIBRARY_SUFFIXES):
            raise LoadError(f"{libraries[0]} lies beside it: libraries of custom operators are not loaded")
        left = list(self._providers)
        while True:
            try:
                return OnnxBackend(self._session(path, left))
            except _LOAD_ERRORS as error:
                reason = _brief(error).replace(str(path), path.name)  # callers are told; paths are not their business
                if len(left) < 2 or left[0] == "cpu":
                    raise LoadError(reason) from error
                extra = {"provider": left[0], "model": str(path), "reason": reason}
                log.warning("model does not load on this provider; the next is tried", extra=extra)
                left.pop(0)

    def _session(self, path: Path, providers: Sequence[str]) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        if self._shares_threads:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other work needs the core
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        chosen = [(PROVIDERS[provider], self._options.of(provider)) for provider in providers]
        return ort.InferenceSession(str(path), options, providers=chosen, enable_fallback=0)


class OnnxBackend:
    """An ExecutionBackend over one session."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.inputs = [_spec(node) for node in session.get_inputs()]
        self.outputs = [_spec(node) for node in session.get_outputs()]
        self.metadata: Mapping[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        self.provider = _provider_of(session)
        self._names = [spec.name for spec in self.outputs]
        halves = [spec for spec in (*self.inputs, *self.outputs) if spec.datatype.name == "BF16"]
        self.run = self._run_with_bf16 if halves else self._run_plain

    def _run_plain(self, feeds: Mapping[str, Array]) -> list[Array]:
        try:
            outputs: list[Array] = self._session.run(self._names, feeds)
        except _LOAD_ERRORS as error:
            raise _fault(error) from error
        return outputs

    def _run_with_bf16(self, feeds: Mapping[str, Array]) -> list[Array]:
        """NumPy has no such type, so its 16 bits go in and out as they are."""
        try:
            values = {
                spec.name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(feeds[spec.name], _BFLOAT16)
                if spec.datatype.name == "BF16"
                else ort.OrtValue.ortvalue_from_numpy(feeds[spec.name])
                for spec in self.inputs
            }
            outputs = self._session.run_with_ort_values(self._names, values)
            return [
                _bits(value) if spec.datatype.name == "BF16" else value.numpy()
                for spec, value in zip(self.outputs, outputs, strict=True)
            ]
        except _LOAD_ERRORS as error:
            raise _fault(error) from error


_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def _bits(value: ort.OrtValue) -> Array:
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(raw, np.uint16).reshape(value.shape())


def _spec(node: Any) -> TensorSpec:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _DATATYPES:
        advice = "; export the classifier without ZipMap" if "map" in kind else ""
        raise LoadError(f"{node.name} is {node.type}, and only tensors of {', '.join(DATATYPES)} travel{advice}")
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(node.name, DATATYPES[_DATATYPES[kind]], shape)


def _provider_of(session: ort.InferenceSession) -> str:
    """The provider that runs most of the graph.

    Not the first that was asked for: a tree ensemble stays on the CPU however much CUDA is wanted.
    """
    nodes: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    return nodes.most_common(1)[0][0] if nodes else str(session.get_providers()[0])


def _fault(error: Exception) -> InputFault | DeviceFault:
    text = _brief(error)
    on_device = isinstance(error, errors.EPFail) or any(word in text.lower() for word in _ON_THE_DEVICE)
    return DeviceFault(text) if on_device else InputFault(text)


def _brief(error: Exception) -> str:
    """ONNX Runtime's message on one line, without its own source paths."""
    return " ".join(str(error).replace("[ONNXRuntimeError] : ", "").split())[:400]
