"""Row expressions over texts, as Python: a list per column, None for null."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Texts = Sequence[str | None]
Pair = tuple[Any, Any]  # values and where they are null, see services/feature/define/expression_numpy.py

_DECIMAL = re.compile(r" *[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)? *")
_CAPITALS, _SMALL = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
_LOWER, _UPPER = str.maketrans(_CAPITALS, _SMALL), str.maketrans(_SMALL, _CAPITALS)


def nulls(texts: Texts) -> NDArray[np.bool_]:
    return np.array([text is None for text in texts], np.bool_)


def lower(texts: Texts) -> Texts:
    return [text and text.translate(_LOWER) for text in texts]


def upper(texts: Texts) -> Texts:
    return [text and text.translate(_UPPER) for text in texts]


def substr(span: slice, texts: Texts) -> Texts:
    return [text and text[span] for text in texts]


def length(texts: Texts) -> Pair:
    return np.array([0.0 if text is None else len(text) for text in texts], np.float64), nulls(texts)


def decimal(texts: Texts) -> Pair:
    """Of a text that is not one, null."""
    found = [float(text) if text and _DECIMAL.fullmatch(text) else None for text in texts]
    return np.array(found, np.float64), np.array([one is None for one in found], np.bool_)


def compared(holds: Callable[[Any, Any], bool], texts: Texts, others: Texts) -> Pair:
    found = [None if a is None or b is None else holds(a, b) for a, b in zip(texts, others, strict=True)]
    return np.array([one is True for one in found], np.bool_), np.array([one is None for one in found], np.bool_)


def among(choices: Collection[str], texts: Texts) -> Pair:
    return np.array([text in choices for text in texts], np.bool_), nulls(texts)


def null_if(texts: Texts, others: Texts) -> Texts:
    return [None if text == other else text for text, other in zip(texts, others, strict=True)]


def coalesce(*columns: Texts) -> Texts:
    rows = zip(*columns, strict=True)
    return [next((text for text in row if text is not None), None) for row in rows]


def case(*operands: Any) -> Texts:
    """operands: a truth and the texts where it holds by turns, then the texts where none does."""
    found: Texts = operands[-1]
    turns = operands[:-1]
    for (true, _), texts in zip(turns[-2::-2], turns[::-2], strict=True):
        holds = np.broadcast_to(true, len(found)).tolist()
        found = [text if yes else other for yes, text, other in zip(holds, texts, found, strict=True)]
    return found


ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
