"""What can be answered without the model: the last good answer, a small model of its own, a calibrated prior."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from services.mesh.columns import RequestColumns, Stored, parse_column
from services.mesh.meshfile import FallbackAnswer
from services.mesh.query import Query

SKEW_S: Final = 5.0  # an answer this little in the future comes from a clock that runs ahead, not from hindsight

Outputs = Sequence[tuple[str, Sequence[float]]]
NowUs = Callable[[], int]
"""Microseconds since 1970 UTC."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What stands in for the model's answer.

    outputs: name -> values. source: the kind that gave it. detail: the same for a person.
    model, version, provider: what computed it, empty where nothing did. age_s: seconds since it was true.
    """

    outputs: Outputs
    source: str
    detail: str
    cost_usd: float
    model: str = ""
    version: str = ""
    provider: str = ""
    age_s: float = 0.0


class Answers(Protocol):
    """One way to answer."""

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer | None]:
        """An answer for each of the queries, None where there is none."""
        ...


class Unusable(ValueError):
    """An artefact that is missing or is not what it should be."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """A good answer as it was given. answered_us: when, microseconds since 1970 UTC."""

    outputs: Outputs
    model: str
    version: str
    answered_us: int


class Memory:
    """Good answers by model and entity id, at most `size`; those that were not given for longest go first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: OrderedDict[tuple[str, str], Remembered] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def keep(self, model: str, entity_id: str, answer: Remembered) -> bool:
        """Whether it was kept: an answer of an earlier moment than what is there is not."""
        key = model, entity_id
        there = self._answers.get(key)
        if there is not None and there.answered_us > answer.answered_us:
            return False
        self._answers[key] = answer
        self._answers.move_to_end(key)
        if len(self._answers) > self._size:
            self._answers.popitem(last=False)
        return True

    def get(self, model: str, entity_id: str) -> Remembered | None:
        return self._answers.get((model, entity_id))


class LastGood:
    """Repeats the newest good answer for the request's entity, while it is young enough."""

    def __init__(self, rule: FallbackAnswer, memory: Memory, now_us: NowUs) -> None:
        self._rule, self._memory, self._now_us = rule, memory, now_us

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer | None]:
        now_us = self._now_us()
        return [self._answer(query, query.request.as_of_us or now_us) for query in queries]

    def _answer(self, query: Query, at_us: int) -> Answer | None:
        entity_id = query.entities.get(self._rule.entity)
        there = self._memory.get(query.model.name, entity_id) if entity_id is not None else None
        if there is None:
            return None
        age_s = (at_us - there.answered_us) / 1e6
        if not -SKEW_S <= age_s <= self._rule.max_age_s:
            return None
        detail = f"the last good answer for {self._rule.entity} {entity_id}"
        return Answer(
            there.outputs,
            "last_good",
            detail,
            self._rule.usd_per_1000 / 1000,
            there.model,
            there.version,
            age_s=max(0.0, age_s),
        )


class SmallModel:
    """Runs a small ONNX model on what the request itself carries, on one CPU thread."""

    def __init__(self, rule: FallbackAnswer, output: str, path: Path) -> None:
        """output: the name of the model's answer. Raises Unusable."""
        if not path.is_file():
            raise Unusable(f"there is no file {path}")
        import onnxruntime as ort  # a mesh whose fallbacks need no model does without

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise Unusable(f"{path}: {error}") from error
        names = self._session.get_modelmeta().custom_metadata_map.get("tenfold.columns", "")
        self._columns = _request_columns(path, names)
        self._input = self._session.get_inputs()[0].name
        outputs = [entry.name for entry in self._session.get_outputs()]
        if output not in outputs:
            raise Unusable(f"{path}: it must have an output {output!r}, got {', '.join(outputs)}")
        self._output, self._rule, self._name = output, rule, path.stem

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer | None]:
        rows = np.array([self._columns.blank] * len(queries), np.float32)
        for row, query in zip(rows, queries, strict=True):
            self._columns.fill(row, query.entities, query.numbers, query.texts)
        (values,) = self._session.run([self._output], {self._input: rows})
        return [self._answer(row) for row in np.asarray(values, np.float32).reshape(len(queries), -1).tolist()]

    def _answer(self, values: list[float]) -> Answer | None:
        if not all(map(math.isfinite, values)):
            return None
        detail = f"the small model {self._name} on the request alone"
        cost_usd = self._rule.usd_per_1000 / 1000
        return Answer([(self._output, values)], "onnx", detail, cost_usd, self._name, provider="CPUExecutionProvider")


class Prior:
    """Looks the answer up in tables of what was true on average, the most specific table first."""

    def __init__(self, rule: FallbackAnswer, path: Path) -> None:
        """Raises Unusable."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Unusable(f"there is no file {path}") from None
        except ValueError as error:
            raise Unusable(f"{path}: {error}") from error
        try:
            self._output = str(document["output"])
            self._default = _values(document["default"])
            self._tables = [
                (tuple(table["by"]), {key: _values(values) for key, values in table["values"].items()})
                for table in document["tables"]
            ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Unusable(f"{path}: it must have output, default and tables of by and values: {error!r}") from error
        for by, _ in self._tables:
            if wrong := [name for name in by if name.partition(".")[0] not in ("entity", "input")]:
                raise Unusable(f"{path}: a table is by entity.<name> or input.<name>, got {wrong[0]!r}")
        self._rule = rule

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer | None]:
        return [self._answer(query) for query in queries]

    def _answer(self, query: Query) -> Answer:
        cost_usd = self._rule.usd_per_1000 / 1000
        for by, table in self._tables:
            parts = [_part(name, query) for name in by]
            if None in parts:
                continue
            values = table.get("|".join(part for part in parts if part is not None))
            if values is not None:
                detail = f"the average by {', '.join(name.partition('.')[2] for name in by)}"
                return Answer([(self._output, values)], "prior", detail, cost_usd)
        return Answer([(self._output, self._default)], "prior", "the average over everything", cost_usd)


def _request_columns(path: Path, text: str) -> RequestColumns:
    try:
        names = json.loads(text)
        columns = [parse_column(name) for name in names]
        if not columns or any(isinstance(column, Stored) for column in columns):
            raise ValueError("it may read input.<name> and entity.<name> only")
        return RequestColumns(columns)
    except (ValueError, TypeError, AttributeError) as error:
        raise Unusable(f"{path}: tenfold.columns must be a JSON list of columns of the request: {error}") from error


def _values(values: Any) -> list[float]:
    numbers = [float(value) for value in values]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"values must be 1 or more finite numbers, got {values}")
    return numbers


def _part(name: str, query: Query) -> str | None:
    """What the request says of "entity.<name>" or "input.<name>", as tables spell it; None for nothing."""
    kind, _, field = name.partition(".")
    if kind == "entity":
        return query.entities.get(field)
    number = query.numbers.get(field)
    if number is None:
        return query.texts.get(field)
    if math.isnan(number):
        return None
    return str(int(number)) if number.is_integer() else repr(number)


def answers_for(
    rules: Sequence[FallbackAnswer], output: str, artefacts: Path, memory: Memory, now_us: NowUs
) -> tuple[list[Answers], Mapping[str, str]]:
    """A model's ways to answer that can be used, best first; and those that cannot: kind -> why."""
    usable: list[Answers] = []
    unusable: dict[str, str] = {}
    remembered = next((rule.entity for rule in rules if rule.kind == "last_good"), "")
    for rule in rules:
        try:
            match rule.kind:
                case "last_good" if rule.entity != remembered:
                    raise Unusable(f"answers are remembered by {remembered}, not by {rule.entity}")
                case "last_good":
                    usable.append(LastGood(rule, memory, now_us))
                case "onnx":
                    usable.append(SmallModel(rule, output, artefacts / rule.path))
                case _:
                    usable.append(Prior(rule, artefacts / rule.path))
        except Unusable as error:
            unusable[rule.kind] = str(error)
    return usable, unusable
