"""From the text of a row expression to its checked tree: sqlglot reads the SQL, what is not listed here is refused."""

from __future__ import annotations

import difflib
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import sqlglot
from sqlglot import Token, TokenType, exp
from sqlglot.errors import ParseError, SqlglotError

from services.feature.define.expression_tree import Apply, Column, ExpressionError, Kind, Literal, Node

MOST_CHARACTERS = 4096
MOST_DEPTH = 64  # levels of the tree; every `+` of a chain is one
MOST_PLACE = 65_536  # of SUBSTR
_DIGITS = re.compile(r"([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)?")
_SHOWN = 60  # characters of a part that a message shows
_LISTED = 24  # names that a message lists

_NUMBER, _TEXT, _TRUTH = Kind.NUMBER, Kind.TEXT, Kind.TRUTH
_ORDERED = (_NUMBER, _TEXT)

# what sqlglot calls it: its name here, the kinds of its parts, its own kind
_FIXED: dict[type[exp.Expr], tuple[str, tuple[Kind, ...], Kind]] = {
    exp.Neg: ("NEGATE", (_NUMBER,), _NUMBER),
    exp.Add: ("+", (_NUMBER, _NUMBER), _NUMBER),
    exp.Sub: ("-", (_NUMBER, _NUMBER), _NUMBER),
    exp.Mul: ("*", (_NUMBER, _NUMBER), _NUMBER),
    exp.Div: ("/", (_NUMBER, _NUMBER), _NUMBER),
    exp.Mod: ("%", (_NUMBER, _NUMBER), _NUMBER),
    exp.And: ("AND", (_TRUTH, _TRUTH), _TRUTH),
    exp.Or: ("OR", (_TRUTH, _TRUTH), _TRUTH),
    exp.Not: ("NOT", (_TRUTH,), _TRUTH),
    exp.Abs: ("ABS", (_NUMBER,), _NUMBER),
    exp.Sqrt: ("SQRT", (_NUMBER,), _NUMBER),
    exp.Ln: ("LN", (_NUMBER,), _NUMBER),
    exp.Exp: ("EXP", (_NUMBER,), _NUMBER),
    exp.Floor: ("FLOOR", (_NUMBER,), _NUMBER),
    exp.Ceil: ("CEIL", (_NUMBER,), _NUMBER),
    exp.Round: ("ROUND", (_NUMBER,), _NUMBER),
    exp.Sign: ("SIGN", (_NUMBER,), _NUMBER),
    exp.Pow: ("POWER", (_NUMBER, _NUMBER), _NUMBER),
    exp.Lower: ("LOWER", (_TEXT,), _TEXT),
    exp.Upper: ("UPPER", (_TEXT,), _TEXT),
    exp.Length: ("LENGTH", (_TEXT,), _NUMBER),
}
# its name here, what its parts may be, all of one kind, and its own kind, or None where that is theirs
_ALIKE: dict[type[exp.Expr], tuple[str, tuple[Kind, ...], Kind | None]] = {
    exp.EQ: ("=", _ORDERED, _TRUTH),
    exp.NEQ: ("<>", _ORDERED, _TRUTH),
    exp.LT: ("<", _ORDERED, _TRUTH),
    exp.LTE: ("<=", _ORDERED, _TRUTH),
    exp.GT: (">", _ORDERED, _TRUTH),
    exp.GTE: (">=", _ORDERED, _TRUTH),
    exp.Nullif: ("NULLIF", _ORDERED, None),
    exp.Coalesce: ("COALESCE", tuple(Kind), None),
    exp.Least: ("LEAST", (_NUMBER,), None),
    exp.Greatest: ("GREATEST", (_NUMBER,), None),
}
_FUNCTIONS = (
    *("ABS", "SQRT", "LN", "EXP", "FLOOR", "CEIL", "ROUND", "SIGN", "POWER", "LEAST", "GREATEST", "COALESCE", "NULLIF"),
    *("LOWER", "UPPER", "LENGTH", "SUBSTR", "CAST", "HOUR_OF_DAY", "DAY_OF_WEEK"),
)
_BEFORE_BRACKETS = ("AND", "OR", "NOT", "IN", "IS", "BETWEEN", "CASE", "WHEN", "THEN", "ELSE")
_ALLOWED = (
    "literals, columns, + - * / %, = <> < <= > >=, AND, OR, NOT, IS NULL, IN, BETWEEN, CASE WHEN and "
    + ", ".join(_FUNCTIONS)
)
# arguments by which sqlglot notes how a dialect writes what it read, all the same to us
_NOTES = {"typed", "safe", "ignore_nulls"}
_HOUR_US, _DAY_US = 3.6e9, 8.64e10


def read(text: str, columns: Mapping[str, Kind], kind: Kind) -> Node:
    """Raises ExpressionError where `text` is not an expression of that kind over those columns."""
    if len(text) > MOST_CHARACTERS:
        raise ExpressionError(f"must have at most {MOST_CHARACTERS} characters, got {len(text)}")
    strange = next((one for one in text if unicodedata.category(one) in ("Cc", "Cs") and one not in "\t\n"), None)
    if strange:
        raise ExpressionError(f"must have no control characters or halves of characters, got {strange!r}")
    try:
        parsed = _parsed(text)
        node = _Reader(columns).read(parsed, kind)
    except RecursionError:
        raise _too_deep() from None
    if kind is _NUMBER and node.kind is _TRUTH:
        return Apply(_NUMBER, "NUMBER", (node,))
    return _wanted(parsed, node, (kind,))


def _parsed(text: str) -> exp.Expr:
    dialect = sqlglot.Dialect.get_or_raise("")
    try:
        _check_functions(dialect.tokenize(text))
        found = dialect.parse_into(exp.Condition, text)
    except SqlglotError as error:
        raise ExpressionError(f"{_cut(text)!r} is not a row expression: {_why(error)}") from None
    if len(found) != 1 or found[0] is None:
        raise ExpressionError(f"{_cut(text)!r} must be one expression, got {sum(part is not None for part in found)}")
    return found[0]


def _why(error: SqlglotError) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, ParseError) else error
    found = cause.errors[0].get("description") if isinstance(cause, ParseError) and cause.errors else None
    why = str(found or error).splitlines()[0]
    return "a function lacks a part" if why.startswith("Required keyword") else why


def _check_functions(tokens: Sequence[Token]) -> None:
    """By name as written: sqlglot would take other names for the same functions."""
    for token, following in itertools.pairwise(tokens):
        if following.token_type is not TokenType.L_PAREN or not token.text.isidentifier():
            continue
        if token.token_type is TokenType.STRING or token.text.upper() in (*_FUNCTIONS, *_BEFORE_BRACKETS):
            continue
        raise ExpressionError(_unknown("function", token.text, _FUNCTIONS))


class _Reader:
    """columns: what an expression may speak of."""

    def __init__(self, columns: Mapping[str, Kind]) -> None:
        self._columns = columns

    def read(self, part: exp.Expr, wanted: Kind | None, depth: int = 0) -> Node:
        """wanted: the kind that NULL gets. depth: how many levels are above it."""
        if depth > MOST_DEPTH:
            raise _too_deep()
        deeper = depth + 1
        match part:
            case exp.Paren():
                return self.read(part.this, wanted, deeper)
            case exp.Literal() | exp.Null() | exp.Boolean():
                return _literal(part, wanted)
            case exp.Neg(this=exp.Literal(is_string=False)):
                return _literal(part, wanted)
            case exp.Column():
                return self._column(part)
            case exp.Is(expression=exp.Null()):
                return Apply(_TRUTH, "IS NULL", (self.read(part.this, None, deeper),))
            case exp.In(expressions=[_, *_]):
                return self._in(part, deeper)
            case exp.Between():
                this, low, high = self._alike(_parts(part, "low", "high"), _ORDERED, None, deeper)
                return Apply(_TRUTH, "AND", (Apply(_TRUTH, ">=", (this, low)), Apply(_TRUTH, "<=", (this, high))))
            case exp.Case() if part.this is None:
                return self._case(part, wanted, deeper)
            case exp.Substring():
                places = (_place(part, "start", least=1), _place(part, "length", least=0))
                return Apply(_TEXT, "SUBSTR", (self._of(part.this, _TEXT, deeper), *places))
            case exp.Cast():
                given, to = _parts(part, "to")
                if to.this is not exp.DType.DOUBLE or isinstance(part, exp.TryCast):
                    raise ExpressionError(f"{_shown(part)}: allowed: CAST(text AS DOUBLE)")
                return Apply(_NUMBER, "CAST", (self._of(given, _TEXT, deeper),))
            case exp.DayOfWeek():
                return _day_of_week(self._of(part.this, _NUMBER, deeper))
            case exp.Anonymous(name=name, expressions=[moment]) if name.upper() == "HOUR_OF_DAY":
                return _hour_of_day(self._of(moment, _NUMBER, deeper))
        if type(part) in _ALIKE:
            what, allowed, kind = _ALIKE[type(part)]
            nodes = self._alike(_parts(part, "expression", "expressions"), allowed, None if kind else wanted, deeper)
            return Apply(kind or nodes[0].kind, what, nodes)
        if type(part) in _FIXED:
            what, kinds, kind = _FIXED[type(part)]
            pairs = zip(_parts(part, "expression"), kinds, strict=True)
            return Apply(kind, what, tuple(self._of(given, wanted, deeper) for given, wanted in pairs))
        raise ExpressionError(f"{_shown(part)}: not part of a row expression, allowed: {_ALLOWED}")

    def _of(self, part: exp.Expr, kind: Kind, depth: int) -> Node:
        return _wanted(part, self.read(part, kind, depth), (kind,))

    def _alike(
        self, parts: Sequence[exp.Expr], allowed: Iterable[Kind], wanted: Kind | None, depth: int
    ) -> tuple[Node, ...]:
        """Parts of one kind: that of the first which is not NULL."""
        found: dict[int, Node] = {}
        for at, part in enumerate(parts):
            if not isinstance(part.unnest(), exp.Null):
                found[at] = _wanted(part, self.read(part, wanted, depth), [wanted] if found and wanted else allowed)
                wanted = found[at].kind
        null = Literal(wanted or _NUMBER, None)
        return tuple(found.get(at, null) for at in range(len(parts)))

    def _column(self, part: exp.Column) -> Node:
        name = ".".join(piece.name for piece in part.parts)
        if isinstance(part.this, exp.Star) or name not in self._columns:
            raise ExpressionError(_unknown("column", name or "*", tuple(self._columns)))
        return Column(self._columns[name], name)

    def _in(self, part: exp.In, depth: int) -> Node:
        given, *choices = _parts(part, "expressions")
        if not all(_is_plain(choice) for choice in choices):
            raise ExpressionError(f"{_shown(part)}: IN takes literals other than NULL")
        return Apply(_TRUTH, "IN", self._alike((given, *choices), _ORDERED, None, depth))

    def _case(self, part: exp.Case, wanted: Kind | None, depth: int) -> Node:
        branches: list[exp.If] = part.args["ifs"]
        results = [branch.args["true"] for branch in branches]
        otherwise = part.args.get("default") or exp.Null()
        nodes = self._alike((*results, otherwise), tuple(Kind), wanted, depth)
        conditions = [self._of(branch.this, _TRUTH, depth) for branch in branches]
        turns = [node for turn in zip(conditions, nodes[:-1], strict=True) for node in turn]
        return Apply(nodes[0].kind, "CASE", (*turns, nodes[-1]))


def _literal(part: exp.Expr, wanted: Kind | None) -> Literal:
    match part:
        case exp.Null():
            return Literal(wanted or _NUMBER, None)
        case exp.Boolean():
            return Literal(_TRUTH, bool(part.this))
        case exp.Literal(is_string=True):
            return Literal(_TEXT, str(part.this))
    negative = isinstance(part, exp.Neg)
    digits = part.this.name if negative else part.name
    value = float(digits) if _DIGITS.fullmatch(digits) else math.nan
    if not math.isfinite(value):
        raise ExpressionError(f"{_shown(part)}: a number must be a decimal within 1.7e308")
    return Literal(_NUMBER, -value if negative else value)


def _is_plain(part: exp.Expr) -> bool:
    return isinstance(part, exp.Literal) or (isinstance(part, exp.Neg) and isinstance(part.this, exp.Literal))


def _place(part: exp.Substring, name: str, least: int) -> Literal:
    given = part.args.get(name)
    if isinstance(given, exp.Literal) and given.name.isdecimal() and least <= int(given.name) <= MOST_PLACE:
        return Literal(_NUMBER, float(given.name))
    found = _shown(given) if given else "none"
    raise ExpressionError(f"{_shown(part)}: {name} must be a whole literal from {least} to {MOST_PLACE}, got {found}")


def _parts(part: exp.Expr, *names: str) -> list[exp.Expr]:
    """Its `this` and those of these names. Raises ExpressionError where it has others, or too few."""
    found = [part.this]
    for name, value in part.args.items():
        if name in names:
            found.extend(value if isinstance(value, list) else [value])
        elif value and name != "this" and name not in _NOTES:
            raise ExpressionError(f"{_shown(part)}: has more parts than allowed")
    if len(found) == 1 and type(part) in _ALIKE:
        raise ExpressionError(f"{_shown(part)}: needs at least 2 parts, got 1")
    return found


# Hours and days count from 1970, a Thursday. Both are written out in what float64 holds exactly: whole microseconds.
def _hour_of_day(moment: Node) -> Node:
    hours, days = _floored(moment, _HOUR_US), _floored(moment, _DAY_US)
    return _number("-", hours, _number("*", days, Literal(_NUMBER, 24.0)))


def _day_of_week(moment: Node) -> Node:
    days = _number("+", _floored(moment, _DAY_US), Literal(_NUMBER, 3.0))
    return _number("-", days, _number("*", _floored(days, 7.0), Literal(_NUMBER, 7.0)))


def _floored(node: Node, unit: float) -> Node:
    return Apply(_NUMBER, "FLOOR", (_number("/", node, Literal(_NUMBER, unit)),))


def _number(what: str, left: Node, right: Node) -> Node:
    return Apply(_NUMBER, what, (left, right))


def _wanted(part: exp.Expr, node: Node, kinds: Iterable[Kind]) -> Node:
    if node.kind not in kinds:
        names = " or ".join(f"a {kind.value}" for kind in kinds)
        whole = f"{_shown(part.parent)}: " if part.parent else ""
        raise ExpressionError(f"{whole}{_shown(part)} is a {node.kind.value}, wanted: {names}")
    return node


def _unknown(what: str, name: str, allowed: Sequence[str]) -> str:
    by_lower = {known.lower(): known for known in allowed}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    guess = f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
    listed = ", ".join(allowed[:_LISTED]) + (f" and {len(allowed) - _LISTED} more" if len(allowed) > _LISTED else "")
    return f"no {what} {_cut(name)!r}{guess}, allowed: {listed or 'none'}"


def _too_deep() -> ExpressionError:
    return ExpressionError(f"must be at most {MOST_DEPTH} levels deep")


def _shown(part: exp.Expr | None) -> str:
    return _cut(part.sql()) if part is not None else ""


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
