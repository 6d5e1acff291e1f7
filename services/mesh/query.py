"""A PredictRequest, checked and in plain Python: the router and the fallback service accept the same requests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from services.mesh.meshfile import MeshFile, Model
from services.resilience.errors import BadInput, NotFound, Violation
from tenfold.router.v1.router_pb2 import PredictRequest

MAX_ENTITIES: Final = 64
MAX_INPUTS: Final = 256
MAX_NAME_BYTES: Final = 64
MAX_TEXT_BYTES: Final = 256  # of an entity's id and of a text input
MAX_REQUEST_ID_BYTES: Final = 128
MAX_BATCH: Final = 256
MOST_VIOLATIONS: Final = 8  # they travel as a trailer, and trailers are small
LARGEST: Final = 3.4028234663852886e38  # float32's largest: models read float32


@dataclass(slots=True)
class Query:
    """What is asked of a model.

    numbers, texts: the request's inputs by kind; NaN is a number that is null.
    """

    request: PredictRequest
    model: Model
    entities: Mapping[str, str]
    numbers: Mapping[str, float]
    texts: Mapping[str, str]


def query_of(request: PredictRequest, models: Mapping[str, Model]) -> Query:
    """The request, checked for everything that does not depend on how its model is served.

    Raises BadInput with every violation, NotFound for a model or tier that does not exist.
    """
    wrong: list[Violation] = []
    entities = dict(request.entities)
    if request.entities:
        _check_entities(entities, wrong)
    numbers, texts = _inputs_of(request, wrong)
    if _longer(request.request_id, MAX_REQUEST_ID_BYTES):
        wrong.append(Violation("request_id", _too_long(request.request_id, MAX_REQUEST_ID_BYTES)))
    if request.as_of_us < 0:
        wrong.append(Violation("as_of_us", f"must be at least 0 (0 means now), got {request.as_of_us}"))
    if not request.model:
        wrong.append(Violation("model", f"must name a model, got ''; there are {', '.join(sorted(models))}"))
    if wrong:
        raise BadInput(*wrong[:MOST_VIOLATIONS])
    model = models.get(request.model)
    if model is None:
        raise NotFound(f"no model {request.model[:MAX_NAME_BYTES]!r}; there are {', '.join(sorted(models))}")
    if request.tier and all(request.tier != tier.name for tier in model.tiers):
        tiers = ", ".join(tier.name for tier in model.tiers)
        raise NotFound(f"model {model.name!r} has no tier {request.tier[:MAX_NAME_BYTES]!r}; it has {tiers}")
    return Query(request, model, entities, numbers, texts)


def check_batch(size: int, largest: int = MAX_BATCH) -> None:
    """Raises BadInput where a batch has no requests or too many."""
    if not 1 <= size <= largest:
        raise BadInput(Violation("requests", f"must be 1 to {largest} requests, got {size}"))


def models_of(mesh: MeshFile) -> dict[str, Model]:
    return {model.name: model for model in mesh.models}


def _check_entities(entities: Mapping[str, str], wrong: list[Violation]) -> None:
    if len(entities) > MAX_ENTITIES:
        wrong.append(Violation("entities", f"must be at most {MAX_ENTITIES}, got {len(entities)}"))
    _check_names("entities", entities, wrong)
    if _all_short(entities.values(), MAX_TEXT_BYTES):
        return
    for name, text in entities.items():
        if not text:
            wrong.append(Violation(f"entities[{name[:MAX_NAME_BYTES]}]", "must be an id of 1 byte or more, got ''"))
        elif _longer(text, MAX_TEXT_BYTES):
            wrong.append(Violation(f"entities[{name[:MAX_NAME_BYTES]}]", _too_long(text, MAX_TEXT_BYTES)))


def _inputs_of(request: PredictRequest, wrong: list[Violation]) -> tuple[dict[str, float], dict[str, str]]:
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    if len(request.inputs) > MAX_INPUTS:
        wrong.append(Violation("inputs", f"must be at most {MAX_INPUTS}, got {len(request.inputs)}"))
        return numbers, texts
    for name, value in request.inputs.items():
        kind = value.WhichOneof("kind")
        if kind == "number":
            number = numbers[name] = value.number
            if abs(number) > LARGEST:
                what = f"must be NaN for null or a number that fits float32, got {number}"
                wrong.append(Violation(f"inputs[{name[:MAX_NAME_BYTES]}]", what))
        elif kind == "text":
            text = texts[name] = value.text
            if _longer(text, MAX_TEXT_BYTES):
                wrong.append(Violation(f"inputs[{name[:MAX_NAME_BYTES]}]", _too_long(text, MAX_TEXT_BYTES)))
        else:
            wrong.append(Violation(f"inputs[{name[:MAX_NAME_BYTES]}]", "must have a number or a text, got neither"))
    _check_names("inputs", numbers, wrong)
    _check_names("inputs", texts, wrong)
    return numbers, texts


def _check_names(field: str, names: Collection[str], wrong: list[Violation]) -> None:
    if _all_short(names, MAX_NAME_BYTES):
        return
    for name in names:
        if not name:
            wrong.append(Violation(field, "names must have 1 byte or more, got ''"))
        elif _longer(name, MAX_NAME_BYTES):
            wrong.append(Violation(field, f"names {_too_long(name, MAX_NAME_BYTES)}"))


def _all_short(texts: Collection[str], most: int) -> bool:
    """Whether all are surely 1 to `most` bytes; a quick look that spares a closer one."""
    return not texts or ("" not in texts and 4 * max(map(len, texts)) <= most)


def _longer(text: str, most: int) -> bool:
    # a character takes at most 4 bytes: short texts need no encoding to know that they fit
    return 4 * len(text) > most and len(text.encode()) > most


def _too_long(text: str, most: int) -> str:
    return f"must be at most {most} bytes, got {len(text.encode())}"
