"""What a model's input columns are named after, and how those that a request itself carries are filled.

The ONNX property "tenfold.columns" lists them in order:
"<view>.<column>"       a stored feature
"input.<name>"          a number of the request's inputs, NaN where it was left out
"entity.<entity>=<id>"  1 where the request is about this entity, else 0
"input.<name>=<text>"   1 where the text input is this one, else 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Stored:
    view: str
    column: str


@dataclass(frozen=True, slots=True)
class Number:
    name: str


@dataclass(frozen=True, slots=True)
class IsEntity:
    entity: str
    id: str


@dataclass(frozen=True, slots=True)
class IsText:
    name: str
    text: str


Column = Stored | Number | IsEntity | IsText


def parse_column(text: str) -> Column:
    """The column that `text` names. Raises ValueError where it names none."""
    head, dot, rest = text.partition(".")
    name, equals, value = rest.partition("=")
    if not (head and dot and name):
        raise ValueError(f"a column must be <view>.<column>, input.<name> or entity.<entity>=<id>, got {text!r}")
    if head == "input":
        return IsText(name, value) if equals else Number(name)
    if head == "entity":
        if not equals:
            raise ValueError(f"an entity column must be entity.<entity>=<id>, got {text!r}")
        return IsEntity(name, value)
    return Stored(head, rest)


class Row(Protocol):
    """One row of a model's input."""

    def __setitem__(self, index: int, value: float) -> None: ...


class RequestColumns:
    """The columns of one model that a request itself carries.

    blank: a row of the whole model to start from: 0 where a column asks whether, NaN elsewhere.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        if len(set(columns)) != len(columns):
            raise ValueError("a model must not name a column twice")
        self.numbers = [(column.name, at) for at, column in enumerate(columns) if isinstance(column, Number)]
        self.entities: dict[str, dict[str, int]] = {}
        self.texts: dict[str, dict[str, int]] = {}
        for at, column in enumerate(columns):
            if isinstance(column, IsEntity):
                self.entities.setdefault(column.entity, {})[column.id] = at
            elif isinstance(column, IsText):
                self.texts.setdefault(column.name, {})[column.text] = at
        self.blank = [0.0 if isinstance(column, IsEntity | IsText) else math.nan for column in columns]

    def fill(
        self, row: Row, entities: Mapping[str, str], numbers: Mapping[str, float], texts: Mapping[str, str]
    ) -> None:
        """Writes what the request says into `row`, which starts as `blank`."""
        for name, at in self.numbers:
            if (number := numbers.get(name)) is not None:
                row[at] = number
        for said, choices in ((entities, self.entities), (texts, self.texts)):
            for name, places in choices.items():
                place = places.get(said.get(name, ""))
                if place is not None and name in said:
                    row[place] = 1.0
