"""Skew as metrics: OpenMetrics text, for whatever collects files of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.feature.check.checks import Checked
from services.feature.check.skew import ColumnSkew

_GAUGES = (
    ("tenfold_feature_mismatch_ratio", "Rows whose value is not what the events say, of those compared."),
    ("tenfold_feature_null_ratio", "Rows without a value, of those compared."),
    ("tenfold_feature_shift", "Kolmogorov-Smirnov distance of the values from what the events say."),
)


def text_of(checked: Sequence[Checked]) -> str:
    """Gauges by path, view and feature."""
    lines: list[str] = []
    for number, (name, told) in enumerate(_GAUGES):
        lines += [f"# HELP {name} {told}", f"# TYPE {name} gauge"]
        for one in checked:
            for skew in one.columns:
                lines += _samples(name, number, one.path, skew)
    return "\n".join((*lines, "# EOF", ""))


def write(path: Path, checked: Sequence[Checked]) -> None:
    """Replaces the file at once: a collector never reads half of it."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text_of(checked), encoding="utf-8")
    new.replace(path)


def _samples(name: str, number: int, path: str, skew: ColumnSkew) -> list[str]:
    labels = f'path="{path}",view="{skew.view}",feature="{skew.column}"'  # none of them can hold a quote
    if number == 0:
        return [f"{name}{{{labels}}} {skew.share!r}"]
    if number == 1:
        given, expected = (f'{labels},of="{of}"' for of in ("given", "expected"))
        return [f"{name}{{{given}}} {skew.null_given!r}", f"{name}{{{expected}}} {skew.null_expected!r}"]
    return [f"{name}{{{labels}}} {skew.shift!r}"]
