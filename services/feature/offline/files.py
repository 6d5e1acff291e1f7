"""The Parquet files of a source: where they are, and whether they hold what a view reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import fsspec

from services.feature.define.definition import Source, View
from services.feature.define.expression import Kind

_INTEGERS = re.compile(r"U?(TINY|SMALL|BIG)?INT(EGER)?")
_NUMBERS = re.compile(rf"{_INTEGERS.pattern}|HUGEINT|FLOAT|DOUBLE|DECIMAL\(.*\)|BOOLEAN")
_TEXTS = re.compile(r"VARCHAR|ENUM\(.*\)")


class OfflineError(RuntimeError):
    """The events cannot be read; the message names the view, the source, the file and the column."""


@dataclass(frozen=True, slots=True)
class Files:
    """folder: a path or an fsspec URL; its file system becomes known to the connection."""

    con: duckdb.DuckDBPyConnection
    folder: str
    view: View
    source: Source

    def relation(self) -> str:
        """What stands in FROM. A column that some files lack is null there; folders like day=2013-01-01 are columns."""
        return f"read_parquet({self._glob()}, union_by_name = true, hive_types_autocast = false)"

    def rows(self) -> int:
        """Of all files, by their footers."""
        found = self.con.execute(f"SELECT sum(num_rows) FROM parquet_file_metadata({self._glob()})").fetchall()  # noqa: S608
        return int(found[0][0] or 0)

    def check(self, columns: Mapping[str, Kind | None]) -> None:
        """Raises OfflineError unless the files hold these columns. None: an int64 that every file must have."""
        schemas = self._schemas()
        for column, kind in columns.items():
            having = {file: schema[column] for file, schema in schemas.items() if column in schema}
            lacking = [file for file in schemas if file not in having and f"/{column}=" not in file]
            if lacking and (kind is None or len(lacking) == len(schemas)):
                raise self._error(f"{lacking[0]} has no column {column!r}, it has: {', '.join(schemas[lacking[0]])}")
            allowed, words = _ALLOWED[kind]
            for file, found in having.items():
                if not allowed.fullmatch(found):
                    raise self._error(f"{file}: column {column!r} must be {words}, got {found}")

    def damage(self, columns: Iterable[str]) -> OfflineError | None:
        """The first file and column that cannot be read, found by reading all of them; None where all can."""
        for (file,) in self.con.execute(f"SELECT file FROM glob({self._glob()}) ORDER BY file").fetchall():  # noqa: S608
            one = f"read_parquet({_literal(file)})"
            for column in columns:
                try:
                    self.con.execute(f'SELECT bit_xor(hash("{column}")) FROM {one}').fetchall()  # noqa: S608
                except duckdb.BinderException:
                    continue  # the file lacks it
                except duckdb.Error as error:
                    return self._error(f"{file}: column {column!r} cannot be read: {error}")
        return None

    def _schemas(self) -> dict[str, dict[str, str]]:
        """File -> column -> type."""
        query = f"SELECT file_name, name, duckdb_type FROM parquet_schema({self._glob()})"  # noqa: S608
        try:
            rows = self.con.execute(query).fetchall()
        except duckdb.Error as error:
            raise self._error(f"a file cannot be read: {error}") from error
        schemas: dict[str, dict[str, str]] = {}
        for file, name, found in rows:
            schema = schemas.setdefault(file, {})
            if found is not None:
                schema[name] = found
        return schemas

    def _glob(self) -> str:
        """As a literal. Raises OfflineError where there is no such file."""
        path = f"{self.folder.rstrip('/')}/{self.source.path}"
        if "://" in path:
            system, _ = fsspec.core.url_to_fs(path)
            protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
            if not self.con.filesystem_is_registered(protocol):
                self.con.register_filesystem(system)
            found = bool(system.glob(path))
        else:
            found = any(Path(self.folder).glob(self.source.path))
        if not found:
            raise self._error(f"there is no file {path}")
        return _literal(path)

    def _error(self, problem: str) -> OfflineError:
        return OfflineError(f"view {self.view.name!r}, source {self.source.name!r}: {problem}")


def file_facts(folder: str, path: str) -> dict[str, int]:
    """Files that match, bytes of all, and when the newest changed: seconds since 1970, 0 where that is not told."""
    system, pattern = fsspec.core.url_to_fs(f"{folder.rstrip('/')}/{path}")
    found = system.glob(pattern, detail=True).values()
    changes = [float(changed) for file in found if isinstance(changed := file.get("mtime"), int | float)]
    return {
        "files": len(found),
        "bytes": sum(int(file["size"] or 0) for file in found),
        "changed": int(max(changes, default=0)),
    }


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


_ALLOWED = {
    None: (_INTEGERS, "an integer"),
    Kind.NUMBER: (_NUMBERS, "a number"),
    Kind.TEXT: (_TEXTS, "text"),
}
