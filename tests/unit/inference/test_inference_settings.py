"""Settings of the inference service."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.inference.settings import InferenceSettings
from services.mesh.settings import SettingsError, from_env


def read(tmp_path: Path, **more: str) -> InferenceSettings:
    base = {"MESH_FILE": "tenfold.toml", "LISTEN": "127.0.0.1:0", "INSTANCE": "inference-0", "MODELS": str(tmp_path)}
    return from_env(InferenceSettings, {f"TENFOLD_{key}": value for key, value in (base | more).items()})


def test_every_knob_is_read(tmp_path: Path) -> None:
    settings = read(tmp_path, PROVIDERS="cuda, cpu", PINS="a=3, b=1", MAX_BATCH="8", MAX_RUN_MS="5", CUDA_MEMORY_MB="2")
    assert settings.provider_list == ["cuda", "cpu"]
    assert settings.pinned == {"a": 3, "b": 1}
    assert (settings.limits.max_rows, settings.limits.max_run_s) == (8, 0.005)
    assert settings.options.cuda_memory_bytes == 2 * 2**20


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODELS", "/nowhere", "TENFOLD_MODELS must be a folder, got '/nowhere'"),
        ("PROVIDERS", "cpu,tpu", "TENFOLD_PROVIDERS must list some of tensorrt, cuda, cpu, got 'cpu,tpu'"),
        ("PINS", "../m=1", "TENFOLD_PINS must look like"),
        ("PINS", "m=0", "TENFOLD_PINS must look like"),
        ("MAX_BATCH", "0", "max_rows must be at least 1, got 0"),
        ("POLL_S", "0", "TENFOLD_POLL_S must be above 0 s, got 0.0"),
        ("THREADS", "0", "threads must be from 1 to 256, got 0"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(tmp_path: Path, name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, **{name: value})
    assert message in str(caught.value)
