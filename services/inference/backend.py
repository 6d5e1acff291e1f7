"""What executes a model, and how a model earns its place before it takes traffic."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.inference.batcher import Estimate, Limits
from services.inference.tensors import Array, Inputs, Signature, TensorSpec
from services.resilience.call import Clock


class LoadError(Exception):
    """A model that cannot be served; the message says why, for a person."""


class InputFault(Exception):
    """A run failed because of what was fed to it."""


class DeviceFault(Exception):
    """A run failed because of where it ran: memory, driver, device. Other inputs would have failed too."""


class ExecutionBackend(Protocol):
    """A loaded model."""

    @property
    def provider(self) -> str:
        """What really runs it, for example "CPUExecutionProvider"."""
        ...

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...
    @property
    def outputs(self) -> Sequence[TensorSpec]: ...
    @property
    def metadata(self) -> Mapping[str, str]:
        """What the model's author wrote into its file."""
        ...

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Every output, in order. Blocks; called by one thread at a time. Raises InputFault or DeviceFault."""
        ...


@dataclass(frozen=True, slots=True)
class Warmed:
    """A model that has run. note: what a person should know of how it will be served, or empty."""

    signature: Signature
    estimate: Estimate
    note: str = ""


def warm_up(backend: ExecutionBackend, limits: Limits, clock: Clock = time.perf_counter) -> Warmed:
    """Runs a model at the sizes it will meet, so that the first request is not slower than the others.

    A model batches where every input and output has a free first dimension and a row's answer does not depend on the
    rows beside it. That is tried, not believed: a softmax over the wrong axis would mix the answers of strangers.
    Raises LoadError where the model cannot run.
    """
    signature = Signature(backend.inputs, backend.outputs, limits.max_rows if _first_is_free(backend) else 0)
    note = _why_rows_mix(backend, signature) if signature.max_batch else ""
    if note:
        signature = Signature(backend.inputs, backend.outputs, 0)
    try:
        estimate = _measured(backend, signature, limits, clock)
    except (InputFault, DeviceFault) as error:
        if any(-1 in spec.shape[1:] for spec in backend.inputs):  # our guess at the free dimensions may be the fault
            return Warmed(signature, Estimate(), f"not warmed: {error}")
        raise LoadError(f"it does not run on zeros: {error}") from error
    return Warmed(signature, estimate, note)


def _first_is_free(backend: ExecutionBackend) -> bool:
    return all(spec.shape and spec.shape[0] == -1 for spec in (*backend.inputs, *backend.outputs))


def _measured(backend: ExecutionBackend, signature: Signature, limits: Limits, clock: Clock) -> Estimate:
    estimate = Estimate()

    def run(rows: int, *, count: int) -> None:
        feeds = _feeds(signature, rows)
        for _ in range(count):
            started = clock()
            backend.run(feeds)
            taken = clock() - started
        estimate.observe(rows, taken)  # the last: the first one allocates

    run(1, count=3)
    if signature.max_batch > 1:
        # no batch will be longer than max_run_s, except one that a single call fills
        affordable = int(limits.max_run_s / max(estimate.of(1), 1e-6))
        run(min(signature.max_batch, max(affordable, 2)), count=2)
    return estimate


def _why_rows_mix(backend: ExecutionBackend, signature: Signature) -> str:
    """Empty where two rows get the answers together that they get alone."""
    pair = _feeds(signature, 2, np.random.default_rng(10))
    try:
        together = backend.run(pair)
        alone = [backend.run({name: array[row : row + 1] for name, array in pair.items()}) for row in (0, 1)]
    except (InputFault, DeviceFault):
        return ""  # our numbers mean nothing to it, or it does not run at all, which the next step tells
    for at, spec in enumerate(signature.outputs):
        if not together[at].ndim or len(together[at]) != 2:
            return f"not batched: output {spec.name} has shape {together[at].shape} for 2 rows"
        if any(alone[row][at].shape != together[at][row : row + 1].shape for row in (0, 1)):
            return f"not batched: output {spec.name} has another shape for 1 row than for 2"
        if not all(_same(alone[row][at][0], together[at][row]) for row in (0, 1)):
            return f"not batched: output {spec.name} of a row depends on the rows beside it"
    return ""


def _same(one: Array, other: Array) -> bool:
    if one.dtype.kind == "f":
        return np.allclose(one, other, rtol=1e-2, atol=1e-4, equal_nan=True)
    return bool(np.array_equal(one, other))


def _feeds(signature: Signature, rows: int, random: np.random.Generator | None = None) -> dict[str, Array]:
    """Zeros, or different small numbers in every row; 1 for every free dimension but the first."""
    values = []
    shapes = []
    for spec in signature.inputs:
        free = [1 if size == -1 else size for size in spec.shape]
        shape = (rows, *free[1:]) if signature.max_batch else tuple(free)
        shapes.append(shape[1:] if signature.max_batch else shape)
        array = np.full(shape, "", object) if spec.datatype.dtype == object else np.zeros(shape, spec.datatype.dtype)
        if random is not None and array.dtype.kind == "f":
            array += random.random(shape).astype(array.dtype)
        elif random is not None and array.dtype.kind in "iu" and spec.datatype.name != "BF16":
            array += random.integers(0, 2, shape).astype(array.dtype)
        values.append(array if array.dtype == object else array.tobytes())
    return signature.feeds([Inputs(rows, tuple(shapes), values)])
