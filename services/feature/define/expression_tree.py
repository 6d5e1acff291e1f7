"""What a row expression is once it has been checked: a small tree in which every part has a kind."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ExpressionError(ValueError):
    """An expression that cannot mean anything; the message names the part that is wrong and what is allowed."""


class Kind(enum.Enum):
    NUMBER = "number"  # float64
    TEXT = "text"
    TRUTH = "truth"


@dataclass(frozen=True, slots=True)
class Literal:
    """value: None for NULL, whose kind its surroundings gave it."""

    kind: Kind
    value: float | str | bool | None


@dataclass(frozen=True, slots=True)
class Column:
    kind: Kind
    name: str


@dataclass(frozen=True, slots=True)
class Apply:
    """A function or operator, under its name in SQL in capitals.

    "NEGATE" is the minus before a number. "NUMBER" makes a number of a truth, 1 or 0. CASE holds condition and result
    by turns, then the result of ELSE.
    """

    kind: Kind
    what: str
    parts: tuple[Node, ...]


Node = Literal | Column | Apply


def columns_of(node: Node) -> tuple[str, ...]:
    """The names of the columns it reads, in the order of their first use."""
    if isinstance(node, Column):
        return (node.name,)
    if isinstance(node, Literal):
        return ()
    return tuple(dict.fromkeys(name for part in node.parts for name in columns_of(part)))
