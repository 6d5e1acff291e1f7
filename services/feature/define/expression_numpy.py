"""A row expression as numpy: compiled once into closures, so that evaluating one row costs its numpy calls alone.

What the parts of a tree evaluate to:

- a number: float64 values, and where they are null; the value there may be anything;
- a truth: where it is true, and where it is null, never both;
- a text: a list, None for null.

Literals, and what is made of them alone, may be scalars; `False` itself as the second of a pair says "nowhere null".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.feature.define import expression_texts as texts
from services.feature.define.expression_texts import Pair
from services.feature.define.expression_tree import Apply, Column, Kind, Literal, Node

Columns = Mapping[str, Any]
Part = Callable[[Columns, int], Any]  # of the columns and how many rows they have

_FEW = 8  # choices of IN that are compared faster one by one


def compiled(node: Node) -> Part:
    """What evaluates a whole expression: to a float64 and a bool array, to two bool arrays, or to a list."""
    part, numeric = _part(node), node.kind is Kind.NUMBER
    if node.kind is Kind.TEXT:
        return part

    def whole(columns: Columns, n: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        with np.errstate(all="ignore"):
            values, null = part(columns, n)
        if numeric and null is not False:
            values = np.where(null, np.nan, values)
        return _full(values, n), _full(null, n)

    return whole


def _full(values: Any, n: int) -> NDArray[Any]:
    return values if getattr(values, "ndim", 0) == 1 else np.full(n, values)


def _part(node: Node) -> Part:
    if isinstance(node, Column):
        return partial(_texts if node.kind is Kind.TEXT else _pair, node.name)
    if isinstance(node, Literal):
        return _literal(node)
    function, nodes = _function(node)
    parts = [_part(part) for part in nodes]
    # most have one or two parts, which are quicker without a list
    if len(parts) == 1:
        (one,) = parts
        return lambda columns, n: function(one(columns, n))
    if len(parts) == 2:
        left, right = parts
        return lambda columns, n: function(left(columns, n), right(columns, n))
    return lambda columns, n: function(*[part(columns, n) for part in parts])


def _function(node: Apply) -> tuple[Callable[..., Any], tuple[Node, ...]]:
    """What makes its value of the values of these parts."""
    what, parts = node.what, node.parts
    first, last = parts[0], parts[-1]
    of_texts = first.kind is Kind.TEXT
    if what == "SUBSTR":
        start, length = (int(part.value or 0) for part in parts[1:] if isinstance(part, Literal))
        return partial(texts.substr, slice(start - 1, start - 1 + length)), (first,)
    if what == "IN":
        choices: list[Any] = [part.value for part in parts[1:] if isinstance(part, Literal)]
        return partial(texts.among, frozenset(choices)) if of_texts else _among(choices), (first,)
    if what in _ORDERS:
        if of_texts:
            return partial(texts.compared, texts.ORDERS[what]), parts
        return partial(_compared, (_ORDERS_OF_LITERALS if isinstance(last, Literal) else _ORDERS)[what]), parts
    if what in _QUOTIENTS:
        safe = isinstance(last, Literal) and bool(last.value)
        return partial(_of_two if safe else _parted, _QUOTIENTS[what]), parts
    if what in _OF_TEXTS and Kind.TEXT in (first.kind, last.kind):
        return _OF_TEXTS[what], parts
    return _OTHERS[what], parts


def _pair(name: str, columns: Columns, _n: int) -> Pair:
    pair: Pair = columns[name]
    return pair


def _texts(name: str, columns: Columns, _n: int) -> list[str | None]:
    return list(columns[name])


def _literal(node: Literal) -> Part:
    value = node.value
    if node.kind is Kind.TEXT:
        return lambda _columns, n: [value] * n
    scalar: Callable[[Any], Any] = np.float64 if node.kind is Kind.NUMBER else np.bool_
    constant = (scalar(0), np.True_) if value is None else (scalar(value), False)
    return lambda _columns, _n: constant


def _either(null: Any, other: Any) -> Any:
    if null is False:
        return other
    return null if other is False else null | other


def _without(some: Any, others: Any) -> Any:
    return some if others is False else np.greater(some, others)


def _of_one(ufunc: Callable[[Any], Any], pair: Pair) -> Pair:
    return ufunc(pair[0]), pair[1]


def _of_two(ufunc: Callable[[Any, Any], Any], left: Pair, right: Pair) -> Pair:
    return ufunc(left[0], right[0]), _either(left[1], right[1])


def _parted(ufunc: Callable[[Any, Any], Any], left: Pair, right: Pair) -> Pair:
    """A quotient or a remainder: by 0 it is null."""
    return ufunc(left[0], right[0]), _either(_either(left[1], right[1]), right[0] == 0)


def _compared(holds: Callable[[Any, Any], Any], left: Pair, right: Pair) -> Pair:
    null = _either(left[1], right[1])
    return _without(holds(left[0], right[0]), null), null


def _sqrt(pair: Pair) -> Pair:
    return np.sqrt(pair[0]), _either(pair[1], pair[0] < 0)


def _ln(pair: Pair) -> Pair:
    return np.log(pair[0]), _either(pair[1], pair[0] <= 0)


def _power(left: Pair, right: Pair) -> Pair:
    base, exponent = left[0], right[0]
    values = np.power(base, exponent)
    # to numpy the power is 1 of 1 to NaN and of NaN to 0
    unreal = np.isnan(values) | np.isnan(base) | np.isnan(exponent) | ((base == 0) & (exponent < 0))
    return values, _either(_either(left[1], right[1]), unreal)


def _round(values: Any) -> Any:
    """Half away from zero. Adding a half and cutting would take the number just below a half to 1."""
    whole = np.trunc(values)
    return whole + np.where(np.abs(values - whole) >= 0.5, np.sign(values), 0.0)


def _least(*pairs: Pair) -> Pair:
    return reduce(partial(_of_two, np.fmin), pairs)  # passes NaN over, which is above every number


def _greatest(*pairs: Pair) -> Pair:
    return reduce(partial(_of_two, np.maximum), pairs)  # NaN where any is


def _not(pair: Pair) -> Pair:
    return np.logical_not(_either(pair[1], pair[0])), pair[1]


def _and(left: Pair, right: Pair) -> Pair:
    true = left[0] & right[0]
    if left[1] is False and right[1] is False:
        return true, False
    return true, _without(_either(left[1], left[0]) & _either(right[1], right[0]), true)


def _or(left: Pair, right: Pair) -> Pair:
    true, null = left[0] | right[0], _either(left[1], right[1])
    return true, null if null is False else _without(null, true)


def _number(pair: Pair) -> Pair:
    return np.asarray(pair[0], np.float64), pair[1]


def _is_null(pair: Pair) -> Pair:
    return np.False_ if pair[1] is False else pair[1], False


def _among(choices: list[float]) -> Callable[[Pair], Pair]:
    numbers = np.array(choices, np.float64)

    def among(pair: Pair) -> Pair:
        values, null = pair
        few = len(choices) <= _FEW
        true = reduce(np.logical_or, [values == number for number in choices]) if few else np.isin(values, numbers)
        return _without(true, null), null

    return among


def _null_if(left: Pair, right: Pair) -> Pair:
    return left[0], _either(left[1], _compared(_ORDERS["="], left, right)[0])


def _coalesce(*pairs: Pair) -> Pair:
    values, null = pairs[0]
    for others, other_null in pairs[1:]:
        if null is False:
            break
        values = np.where(null, others, values)
        null = False if other_null is False else null & other_null
    return values, null


def _case(*pairs: Pair) -> Pair:
    """pairs: a truth and the value where it holds by turns, then the value where none does."""
    *turns, (values, null) = pairs
    for (true, _), (then, then_null) in zip(turns[-2::-2], turns[::-2], strict=True):
        values = np.where(true, then, values)
        null = False if null is False and then_null is False else np.where(true, then_null, null)
    return values, null


# NaN is equal to itself and above every number
_ORDERS: dict[str, Callable[[Any, Any], Any]] = {
    "=": lambda a, b: (a == b) | ((a != a) & (b != b)),
    "<>": lambda a, b: (a != b) & ((a == a) | (b == b)),
    "<": lambda a, b: (a < b) | ((b != b) & (a == a)),
    "<=": lambda a, b: (a <= b) | (b != b),
    ">": lambda a, b: (a > b) | ((a != a) & (b == b)),
    ">=": lambda a, b: (a >= b) | (a != a),
}
# the same where the right one is a literal, and so not NaN
_ORDERS_OF_LITERALS: dict[str, Callable[[Any, Any], Any]] = {
    "=": np.equal,
    "<>": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": lambda a, b: np.logical_not(a <= b),
    ">=": lambda a, b: np.logical_not(a < b),
}
_QUOTIENTS: dict[str, Callable[[Any, Any], Any]] = {"/": np.divide, "%": np.fmod}
_OF_TEXTS: dict[str, Callable[..., Any]] = {
    "LOWER": texts.lower,
    "UPPER": texts.upper,
    "LENGTH": texts.length,
    "CAST": texts.decimal,
    "IS NULL": lambda given: (texts.nulls(given), False),
    "NULLIF": texts.null_if,
    "COALESCE": texts.coalesce,
    "CASE": texts.case,
}
_OTHERS: dict[str, Callable[..., Any]] = {
    "NEGATE": partial(_of_one, np.negative),
    "+": partial(_of_two, np.add),
    "-": partial(_of_two, np.subtract),
    "*": partial(_of_two, np.multiply),
    "ABS": partial(_of_one, np.abs),
    "SQRT": _sqrt,
    "LN": _ln,
    "EXP": partial(_of_one, np.exp),
    "FLOOR": partial(_of_one, np.floor),
    "CEIL": partial(_of_one, np.ceil),
    "ROUND": partial(_of_one, _round),
    "SIGN": partial(_of_one, np.sign),
    "POWER": _power,
    "LEAST": _least,
    "GREATEST": _greatest,
    "AND": _and,
    "OR": _or,
    "NOT": _not,
    "NUMBER": _number,
    "IS NULL": _is_null,
    "NULLIF": _null_if,
    "COALESCE": _coalesce,
    "CASE": _case,
}
