"""Output in parts, with a manifest, so that a long computation can be cut off anywhere and go on.

    <folder>/manifest.json     what it was made from, and every part that is whole
    <folder>/<name>.parquet    a part

A part is written beside its name and moved there, then the manifest names it; a part that no manifest names is made
again. Works on any file system that fsspec knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet

_MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished"


class PartsError(RuntimeError):
    """The folder cannot be used; the message says what differs, or what is in the way."""


@dataclass(slots=True)
class Parts:
    """The parts of one output.

    facts: everything that shapes the output, as JSON values; parts made from other facts are not mixed with these.
    rows: part name -> rows in it, for every part that is whole.
    """

    folder: str
    facts: Mapping[str, Any]
    rows: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str, facts: Mapping[str, Any], *, restart: bool = False) -> Parts:
        """Goes on with what is in `folder`, a path or the URL of a file system; restart: makes everything again.

        Raises PartsError where it was made from other facts, or holds something else.
        """
        fs, path = fsspec.core.url_to_fs(folder)
        parts = cls(folder, json.loads(json.dumps(facts)))
        try:
            if not fs.exists(f"{path}/{_MANIFEST}"):
                if fs.exists(path) and not fs.isdir(path):
                    raise PartsError(f"{folder} is no folder; name another")
                if fs.exists(path) and fs.ls(path):
                    raise PartsError(f"{folder} is not empty and has no {_MANIFEST}; name another folder")
                fs.makedirs(path, exist_ok=True)
            elif restart:
                parts._forget(fs, path)
            else:
                parts._take_over(fs, path)
            parts._record(fs, path)
        except OSError as error:
            raise PartsError(f"{folder} cannot be used: {error.strerror or error}") from error
        return parts

    @classmethod
    def read(cls, folder: str) -> tuple[Mapping[str, Any], Mapping[str, int]]:
        """The facts that the output was made from, and the rows of every part that is whole. Raises PartsError."""
        fs, path = fsspec.core.url_to_fs(folder)
        if not fs.exists(f"{path}/{_MANIFEST}"):
            raise PartsError(f"{folder} has no {_MANIFEST}")
        parts = cls(folder, {})
        parts._take_over(fs, path, any_facts=True)
        return parts.facts, parts.rows

    def write(self, name: str, table: pa.Table) -> None:
        """Adds a part, or replaces it. name: may hold folders, "day=2013-01-01/bucket=3"."""
        fs, path = fsspec.core.url_to_fs(self.folder)
        whole = f"{path}/{name}.parquet"
        fs.makedirs(whole.rpartition("/")[0], exist_ok=True)
        with fs.open(whole + _UNFINISHED, "wb") as file:
            pa.parquet.write_table(table, file, compression="zstd")
        fs.mv(whole + _UNFINISHED, whole)
        self.rows[name] = table.num_rows
        self._record(fs, path)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that are still to be made, in order."""
        return [name for name in names if name not in self.rows]

    def _take_over(self, fs: Any, path: str, *, any_facts: bool = False) -> None:
        try:
            manifest = json.loads(fs.cat_file(f"{path}/{_MANIFEST}"))
            facts, rows = manifest["facts"], {str(name): int(count) for name, count in manifest["rows"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PartsError(f"{self.folder}/{_MANIFEST} cannot be read: {error}; restart, or name another") from error
        if any_facts:
            self.facts = facts
        if facts != self.facts:
            differing = sorted(key for key in {*facts, *self.facts} if facts.get(key) != self.facts.get(key))
            raise PartsError(
                f"{self.folder} was made from something else: {', '.join(differing)} differ; restart, or name another"
            )
        self.rows = {name: count for name, count in rows.items() if fs.exists(f"{path}/{name}.parquet")}

    def _forget(self, fs: Any, path: str) -> None:
        """Removes what a manifest names, and nothing else."""
        old = Parts(self.folder, {})
        try:
            manifest = json.loads(fs.cat_file(f"{path}/{_MANIFEST}"))
            old.rows = dict(manifest["rows"])
        except (ValueError, KeyError, TypeError):
            old.rows = {}
        for name in old.rows:
            if fs.exists(f"{path}/{name}.parquet"):
                fs.rm_file(f"{path}/{name}.parquet")

    def _record(self, fs: Any, path: str) -> None:
        text = json.dumps({"facts": self.facts, "rows": self.rows}, indent=1) + "\n"
        with fs.open(f"{path}/{_MANIFEST}{_UNFINISHED}", "w") as file:
            file.write(text)
        fs.mv(f"{path}/{_MANIFEST}{_UNFINISHED}", f"{path}/{_MANIFEST}")
