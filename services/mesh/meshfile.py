"""tenfold.toml: the one file that describes a mesh.

Everything is checked when it is read. An error names the line: "tenfold.toml:31: models[0].tiers[1].usd_per_1000:
Expected `float` >= 0".
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from services.resilience.call import Priority

T = TypeVar("T")
Name = Annotated[str, Meta(pattern="^[a-z][a-z0-9_]{0,62}$")]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
AtLeast0 = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]

SERVICES = ("feature", "router", "inference", "fallback")


class MeshFileError(ValueError):
    """The file cannot be used; the message says where and why."""


class Service(Struct, frozen=True, forbid_unknown_fields=True):
    """One of the four services.

    replicas: processes that serve it, behind the gateway.
    transport: "grpcio" or "native": see services/mesh/serve.py.
    """

    name: Name
    replicas: Annotated[int, Meta(ge=1, le=64)] = 1
    transport: str = "grpcio"


class PriorityClass(Struct, frozen=True, forbid_unknown_fields=True):
    """What a priority is promised, and how much of the mesh it may hold at once.

    slo_p99_ms: the 99th percentile of latency it should see, milliseconds.
    max_in_flight: requests that the gateway lets in at the same time; more are shed.
    """

    name: Name
    slo_p99_ms: Positive
    max_in_flight: Count


class Retries(Struct, frozen=True, forbid_unknown_fields=True):
    """attempts: at most, the first included. budget_percent: concurrent retries, of concurrent requests."""

    attempts: Annotated[int, Meta(ge=1, le=3)] = 2
    budget_percent: Annotated[float, Meta(ge=0, le=100)] = 10.0


class Gateway(Struct, frozen=True, forbid_unknown_fields=True):
    """trace_sample: the share of requests whose spans are kept; a client may ask for its own by traceparent.

    default_timeout_ms: for a client that sends no deadline.
    """

    trace_sample: Fraction = 0.01
    default_timeout_ms: Positive = 5000.0
    retries: Retries = Retries()


class Tier(Struct, frozen=True, forbid_unknown_fields=True):
    """One way to answer: a model in the inference repository.

    quality: on held-out data, in a unit shared by the model's tiers (AUC, accuracy); more is better.
    usd_per_1000: what a thousand answers cost in US dollars.
    expected_ms: P90 of the time to an answer when nothing waits, milliseconds.
    """

    name: Name
    model: Name
    quality: float
    usd_per_1000: AtLeast0
    expected_ms: Positive
    version: str = ""


class FallbackAnswer(Struct, frozen=True, forbid_unknown_fields=True):
    """One way to answer when the model cannot.

    kind: "last_good" repeats the newest good answer for `entity` no older than `max_age_s`;
    "onnx" runs the small model at `path` on what the request itself carries;
    "prior" looks the answer up in the table at `path`. Paths are relative to the artefacts.
    usd_per_1000: what a thousand such answers cost in US dollars.
    """

    kind: str
    entity: str = ""
    max_age_s: Positive = 86_400.0
    path: str = ""
    usd_per_1000: AtLeast0 = 0.0


class RequiredQuality(Struct, frozen=True, forbid_unknown_fields=True):
    """The least `quality` of a tier that is good enough, by priority."""

    critical: float
    standard: float
    background: float

    def of(self, priority: Priority) -> float:
        return float(getattr(self, priority.label))


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """What a client asks for by name.

    output: the name of its answer. views: feature views it reads, each keyed by the entity it is about.
    max_missing: the share of a tier's stored feature values that may be missing or expired before the answer is
    marked degraded.
    """

    name: Name
    output: Name
    tiers: Annotated[list[Tier], Meta(min_length=1)]
    required_quality: RequiredQuality
    views: list[Name] = []
    fallbacks: list[FallbackAnswer] = []
    max_missing: Fraction = 0.5


class Features(Struct, frozen=True, forbid_unknown_fields=True):
    """Where feature definitions and events are.

    definitions: a module with VIEWS, by its dotted name or as the path of a .py file.
    offline: the folder of events, relative to the artefacts, or the URL of a file system ("s3://bucket/events").
    """

    definitions: str = ""
    offline: str = "offline"


class MeshFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. artefacts: folder of models, priors and offline data, relative to TENFOLD_HOME."""

    version: Annotated[int, Meta(ge=1, le=1)]
    name: Name
    models: Annotated[list[Model], Meta(min_length=1)]
    priorities: list[PriorityClass]
    artefacts: str = ""
    services: list[Service] = []
    gateway: Gateway = Gateway()
    features: Features = Features()

    def service(self, name: str) -> Service:
        """Its section, or the defaults."""
        return next((service for service in self.services if service.name == name), Service(name))

    def model(self, name: str) -> Model | None:
        return next((model for model in self.models if model.name == name), None)

    def priority(self, priority: Priority) -> PriorityClass:
        return next(entry for entry in self.priorities if entry.name == priority.label)


class FeaturesFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A file without models: of somebody who uses the feature store alone."""

    version: Annotated[int, Meta(ge=1, le=1)]
    name: Name
    features: Features
    artefacts: str = ""


def load(path: Path) -> MeshFile:
    """The file at `path`, checked. Raises MeshFileError with the file's name and line."""
    return parse(_text(path), str(path))


def load_features(path: Path) -> MeshFile | FeaturesFile:
    """Likewise; it may describe features alone."""
    text = _text(path)
    try:
        alone = "models" not in tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        alone = False  # which is then told with its line
    return _converted(text, str(path), FeaturesFile) if alone else parse(text, str(path))


def parse(text: str, source: str = "tenfold.toml") -> MeshFile:
    """The mesh that `text` describes. Raises MeshFileError naming `source` and the line."""
    mesh = _converted(text, source, MeshFile)
    for path, problem in _problems(mesh):
        raise MeshFileError(f"{source}:{line_of(text, path)}: {path}: {problem}")
    return mesh


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise MeshFileError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MeshFileError(f"{path}: must be UTF-8, got byte {error.object[error.start]:#04x}") from error


def _converted(text: str, source: str, kind: type[T]) -> T:
    try:
        return msgspec.convert(tomllib.loads(text), kind)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise MeshFileError(f"{source}:{line[1] if line else len(text.splitlines())}: {error}") from error
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`").lstrip(".")
        raise MeshFileError(f"{source}:{line_of(text, path)}: {path or 'top level'}: {what}") from error


def _problems(mesh: MeshFile) -> list[tuple[str, str]]:
    """What the types cannot say: (path, what is wrong and what is allowed)."""
    found: list[tuple[str, str]] = []
    for i, service in enumerate(mesh.services):
        if service.name not in SERVICES:
            found.append((f"services[{i}].name", f"must be one of {', '.join(SERVICES)}, got {service.name!r}"))
        if service.transport not in ("grpcio", "native"):
            found.append((f"services[{i}].transport", f"must be grpcio or native, got {service.transport!r}"))
    labels = [priority.label for priority in Priority]
    for i, priority in enumerate(mesh.priorities):
        if priority.name not in labels:
            found.append((f"priorities[{i}].name", f"must be one of {', '.join(labels)}, got {priority.name!r}"))
    if missing := set(labels) - {priority.name for priority in mesh.priorities}:
        found.append(("priorities", f"must describe {', '.join(labels)}; {', '.join(sorted(missing))} missing"))
    for m, model in enumerate(mesh.models):
        path = f"models[{m}]"
        best = max(tier.quality for tier in model.tiers)
        for label in labels:
            if (needed := getattr(model.required_quality, label)) > best:
                where = f"{path}.required_quality.{label}"
                found.append((where, f"no tier is that good: {needed} is above the best tier's {best}"))
        for f, fallback in enumerate(model.fallbacks):
            where = f"{path}.fallbacks[{f}]"
            if fallback.kind not in ("last_good", "onnx", "prior"):
                found.append((f"{where}.kind", f"must be last_good, onnx or prior, got {fallback.kind!r}"))
            elif fallback.kind == "last_good" and not fallback.entity:
                found.append((f"{where}.entity", "must name the entity whose last answer is repeated"))
            elif fallback.kind != "last_good" and not fallback.path:
                found.append((f"{where}.path", f"must name the file behind a fallback of kind {fallback.kind}"))
    for path, names in (
        ("services", [service.name for service in mesh.services]),
        ("priorities", [priority.name for priority in mesh.priorities]),
        ("models", [model.name for model in mesh.models]),
        *((f"models[{m}].tiers", [tier.name for tier in model.tiers]) for m, model in enumerate(mesh.models)),
    ):
        for i, name in enumerate(names):
            if name in names[:i]:
                found.append((f"{path}[{i}].name", f"{name!r} is there twice; names must differ"))
    return found


_HEADER = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_.\-]+)\s*\]\]?")
_KEY = re.compile(r"^\s*([A-Za-z0-9_\-]+)\s*[.=]")


def line_of(text: str, path: str) -> int:
    """The line (from 1) where the value at `path` ("models[0].tiers[1].quality") stands, or its nearest parent."""
    wanted = [part for part in re.split(r"[.\[\]]+", path) if part]
    best, best_depth = 1, 0
    table: list[str] = []
    counts: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _resolve(header[2].split("."), header[1] == "[[", counts)
            here = table
        elif key := _KEY.match(line):
            here = [*table, key[1]]
        else:
            continue
        depth = len(here)
        if here == wanted[:depth] and depth > best_depth:
            best, best_depth = number, depth
    return best


def _resolve(names: list[str], is_array: bool, counts: dict[tuple[str, ...], int]) -> list[str]:
    """A table's name with the indices of the arrays it stands in: models.tiers -> models, 0, tiers, 1."""
    resolved: list[str] = []
    for i, name in enumerate(names):
        resolved.append(name)
        key = tuple(resolved)
        if is_array and i == len(names) - 1:
            counts[key] = counts.get(key, -1) + 1
        if key in counts:
            resolved.append(str(counts[key]))
    return resolved
