"""Row expressions: a checked scalar subset of SQL that means the same in every engine and in numpy.

    late = Expression.parse("delay >= 15 AND dest <> 'JFK'", {"delay": Kind.NUMBER, "dest": Kind.TEXT}, Kind.TRUTH)
    late.sql(lambda name: f'"{name}"')
    true, null = late.evaluate({"delay": (delays, nulls), "dest": dests})

Numbers are float64, whatever their column holds; NULL is SQL's, with three-valued AND, OR and NOT. Of what engines
disagree about:

- NaN is a value: equal to itself, above every number, and carried on by arithmetic. Overflow gives infinity.
- Null are: x / 0 and x % 0; SQRT below 0; LN at and below 0; POWER of or to NaN, of 0 to a negative, and where it is
  not real; LEAST and GREATEST where any argument is null.
- % has the sign of the dividend; ROUND goes half away from zero.
- LENGTH and SUBSTR count code points; texts are in the order of their code points; LOWER and UPPER change A to Z alone.
- CAST(text AS DOUBLE) reads decimals such as "-1.5e3", blanks around them allowed; any other text is null.
- hour_of_day(us), 0 to 23, and day_of_week(us), 0 for Monday to 6, of microseconds since 1970, in UTC.

A column whose name is a word of SQL is written in double quotes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.feature.define.expression_numpy import Part, compiled
from services.feature.define.expression_reader import read
from services.feature.define.expression_sql import DIALECTS, render
from services.feature.define.expression_tree import ExpressionError, Kind, Node, columns_of

__all__ = ["Expression", "ExpressionError", "Kind"]


@dataclass(frozen=True, slots=True)
class Expression:
    """columns: the names it reads, in the order of their first use."""

    text: str
    kind: Kind
    columns: Sequence[str]
    _tree: Node = field(compare=False, repr=False)
    _evaluate: Part = field(compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, columns: Mapping[str, Kind], kind: Kind) -> Expression:
        """Raises ExpressionError where it is not an expression of that kind over those columns.

        Where a number is wanted, a truth will do: 1 where it is true, 0 where it is false.
        """
        tree = read(text, columns, kind)
        for dialect in DIALECTS:
            render(tree, _long_name, dialect)  # raises where it would grow too long
        return cls(text, kind, columns_of(tree), tree, compiled(tree))

    def sql(self, column: Callable[[str], str], dialect: str = "duckdb") -> str:
        """column: how a column is written there. dialect: "duckdb", "spark", or "bigquery", whose text is untested."""
        return render(self._tree, column, dialect)

    def evaluate(self, columns: Mapping[str, Any]) -> Any:
        """Its value for n rows.

        columns: of numbers float64 (n,) and where they are null, bool (n,); of truths where they are true, bool (n,),
        and where they are null, bool (n,); of texts a list or object array, None for null. There may be others. An
        expression that reads none has as many rows as the first of them, 1 without any.

        Returns for a NUMBER float64 (n,), NaN where null, and null, bool (n,); for a TRUTH where it is true, bool (n,),
        and null; for a TEXT a list, None for null. They may be the columns' own arrays, so do not write to them.
        """
        return self._evaluate(columns, _rows(columns, self.columns))

    def __reduce__(self) -> tuple[Any, ...]:
        # closures do not travel between processes
        return _restored, (self.text, self.kind, self._tree)


def _long_name(name: str) -> str:
    return f'"{name}"."{name}"'


def _restored(text: str, kind: Kind, tree: Node) -> Expression:
    return Expression(text, kind, columns_of(tree), tree, compiled(tree))


def _rows(columns: Mapping[str, Any], names: Sequence[str]) -> int:
    name = names[0] if names else next(iter(columns), None)
    if name is None:
        return 1
    given = columns[name]
    return len(given[0]) if isinstance(given, tuple) else len(given)
