"""Every knob of the fallback service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.mesh.query import MAX_BATCH
from services.mesh.settings import PREFIX, ServiceSettings


@dataclass(frozen=True, slots=True)
class FallbackSettings(ServiceSettings):
    """Beside what every service needs.

    artefacts: folder that the paths of the mesh file's fallbacks are relative to.
    max_waiting: requests that wait for an answer; more are refused at once. Fallback is capacity, not escape: one
        that queues without bound fails together with what it stands in for.
    max_batch: requests answered in one step.
    remember_at_most: good answers kept, over all models; the least recently given go first. About 1 kB each.
    predict_batch_max: requests in one PredictBatch.
    """

    artefacts: Path = Path()
    max_waiting: int = 512
    max_batch: int = 64
    remember_at_most: int = 200_000
    predict_batch_max: int = MAX_BATCH

    def __post_init__(self) -> None:
        ServiceSettings.__post_init__(self)
        for name in ("max_waiting", "max_batch", "remember_at_most", "predict_batch_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{PREFIX}{name.upper()} must be at least 1, got {getattr(self, name)}")
        if not self.artefacts.is_dir():
            raise ValueError(f"{PREFIX}ARTEFACTS must be a folder, got {str(self.artefacts)!r}")
