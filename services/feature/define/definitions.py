"""Everything that a module of definitions declares."""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from services.feature.define.definition import Aggregate, DefinitionError, RequestView, Source, View

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Definitions:
    """views and request_views: each by a name of its own."""

    views: Sequence[View]
    request_views: Sequence[RequestView] = ()

    def __post_init__(self) -> None:
        names = [*(view.name for view in self.views), *(view.name for view in self.request_views)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DefinitionError(f"view {min(twice)!r}: it is there twice")
        sources: dict[str, Source] = {}
        for view in self.views:
            for source in view.sources:
                if sources.setdefault(source.name, source) != source:
                    raise DefinitionError(f"view {view.name!r}: another source is also named {source.name!r}")
        for request_view in self.request_views:
            request_view.expressions(self.views)

    @property
    def sources(self) -> dict[str, Source]:
        """By name, in the order of their first use."""
        return {source.name: source for view in self.views for source in view.sources}

    def view(self, name: str) -> View:
        """Raises DefinitionError naming those that exist."""
        found = next((view for view in self.views if view.name == name), None)
        if found is None:
            there = ", ".join(view.name for view in self.views) or "none"
            if any(view.name == name for view in self.request_views):
                raise DefinitionError(f"view {name!r} is worked out on request and not stored; stored are: {there}")
            raise DefinitionError(f"there is no view {name!r}; there are: {there}")
        return found

    def request_view(self, name: str) -> RequestView:
        """Likewise."""
        found = next((view for view in self.request_views if view.name == name), None)
        if found is None:
            there = ", ".join(view.name for view in self.request_views) or "none"
            raise DefinitionError(f"there is no request view {name!r}; there are: {there}")
        return found


def load(reference: str) -> Definitions:
    """The VIEWS and REQUEST_VIEWS of a module, by its dotted name or as the path of a .py file.

    Raises DefinitionError naming the file and line, and within them the view and column.
    """
    try:
        module = _module(reference)
    except DefinitionError as error:
        raise DefinitionError(f"{_where(error, reference)}: {error}") from None
    except Exception as error:  # the module is the user's, and may fail in any way
        raise DefinitionError(f"{_where(error, reference)}: {_problem(error)}") from error
    views = _declared(module, reference, "VIEWS", View)
    request_views = _declared(module, reference, "REQUEST_VIEWS", RequestView, needed=False)
    try:
        return Definitions(views, request_views)
    except DefinitionError as error:
        raise DefinitionError(f"{reference}: {error}") from None


def _declared(module: ModuleType, reference: str, name: str, kind: type[T], *, needed: bool = True) -> tuple[T, ...]:
    if needed and not hasattr(module, name):
        raise DefinitionError(f"{reference}: a module of definitions must have {name}")
    found = getattr(module, name, ())
    if not isinstance(found, (tuple, list)):
        raise DefinitionError(f"{reference}: {name} must be a tuple of {kind.__name__}, got {type(found).__name__}")
    for one in found:
        if not isinstance(one, kind):
            raise DefinitionError(
                f"{reference}: {name} must hold {kind.__name__}, got {type(one).__name__}: {one!r:.60}"
            )
    return tuple(found)


def beside(mesh_file: Path, reference: str) -> str:
    """The reference as a mesh file means it: a .py file stands beside it."""
    return str(mesh_file.parent / reference) if reference.endswith(".py") else reference


def _module(reference: str) -> ModuleType:
    if not reference.endswith(".py"):
        return importlib.import_module(reference)
    path = Path(reference)
    spec = importlib.util.spec_from_file_location(f"tenfold_definitions_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _problem(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return error.msg
    if isinstance(error, (ImportError, OSError)):
        return str(error)
    if isinstance(error, AttributeError) and traceback.extract_tb(error.__traceback__)[-1].filename == enum.__file__:
        # Python says no more than the name
        return f"there is no {error}; of Aggregate there are: {', '.join(one.name for one in Aggregate)}"
    return f"{type(error).__name__}: {error}"


def _where(error: Exception, reference: str) -> str:
    """The line of the definitions that was being read: the last one outside this package and Python's own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    ours, python = Path(__file__).parent, Path(enum.__file__).parent
    outside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
        and ours not in (path := Path(frame.filename)).parents
        and (python not in path.parents or "site-packages" in path.parts)
    ]
    return f"{outside[-1].filename}:{outside[-1].lineno}" if outside else reference
