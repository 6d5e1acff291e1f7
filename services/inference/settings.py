"""Every knob of the inference service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.inference.batcher import Limits
from services.inference.onnx import PROVIDERS, Options
from services.inference.repository import is_name
from services.mesh.settings import ServiceSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceSettings(ServiceSettings):
    """models: the repository's folder. poll_s: how often it is looked at for new versions.

    pins: versions to hold on to, "name=3,other=1"; the newest elsewhere.
    providers: execution providers, most wanted first: tensorrt, cuda, cpu. device: which GPU.
    threads: that one run may use. max_batch: rows of one request and of one run. max_waiting: calls, for each model.
    max_run_ms: the longest run that several calls share.
    cuda_memory_mb: the most the CUDA arena may hold, 0 for no limit.
    tensorrt_cache: folder of built engines. tensorrt_fp16: allow half precision.
    """

    models: Path
    poll_s: float = 2.0
    pins: str = ""
    providers: str = "cpu"
    device: int = 0
    threads: int = 1
    max_batch: int = 256
    max_waiting: int = 1024
    max_run_ms: float = 40.0
    cuda_memory_mb: int = 0
    tensorrt_cache: str = ""
    tensorrt_fp16: bool = False

    def __post_init__(self) -> None:
        ServiceSettings.__post_init__(self)  # a class with slots cannot use super() here
        if not self.models.is_dir():
            raise ValueError(f"TENFOLD_MODELS must be a folder, got {str(self.models)!r}")
        if not self.poll_s > 0:
            raise ValueError(f"TENFOLD_POLL_S must be above 0 s, got {self.poll_s}")
        _ = self.limits, self.options, self.provider_list, self.pinned  # each checks its own values

    @property
    def limits(self) -> Limits:
        return Limits(self.max_batch, self.max_waiting, self.max_run_ms / 1000)

    @property
    def options(self) -> Options:
        return Options(
            threads=self.threads,
            device=self.device,
            cuda_memory_bytes=self.cuda_memory_mb * 2**20,
            tensorrt_cache=self.tensorrt_cache,
            tensorrt_fp16=self.tensorrt_fp16,
        )

    @property
    def provider_list(self) -> Sequence[str]:
        names = [name.strip() for name in self.providers.split(",")]
        for name in names:
            if name not in PROVIDERS:
                raise ValueError(f"TENFOLD_PROVIDERS must list some of {', '.join(PROVIDERS)}, got {self.providers!r}")
        return names

    @property
    def pinned(self) -> Mapping[str, int]:
        pins: dict[str, int] = {}
        for pin in filter(None, self.pins.split(",")):
            name, _, version = pin.strip().partition("=")
            if not is_name(name) or not version.isdecimal() or int(version) < 1:
                raise ValueError(f'TENFOLD_PINS must look like "model=3,other=1", got {self.pins!r}')
            pins[name] = int(version)
        return pins
