"""Everything that a module of definitions declares."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from services.feature.define.definition import DefinitionError, RequestView, Source, View


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
            raise DefinitionError(f"there is no view {name!r}; there are: {', '.join(v.name for v in self.views)}")
        return found


def load(reference: str) -> Definitions:
    """The VIEWS and REQUEST_VIEWS of a module, by its dotted name or as the path of a .py file.

    Raises DefinitionError naming the file and line, and within them the view and column.
    """
    try:
        module = _module(reference)
        return Definitions(tuple(module.VIEWS), tuple(getattr(module, "REQUEST_VIEWS", ())))
    except DefinitionError as error:
        raise DefinitionError(f"{_where(error, reference)}: {error}") from None
    except AttributeError as error:
        raise DefinitionError(f"{reference}: a module of definitions must have VIEWS: {error}") from None
    except (ImportError, SyntaxError, OSError, TypeError) as error:
        raise DefinitionError(f"{_where(error, reference)}: {error}") from error


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


def _where(error: BaseException, reference: str) -> str:
    """The line of the definitions that was being read: the last one outside this package."""
    here = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not f.filename.startswith((here, "<"))]
    return f"{outside[-1].filename}:{outside[-1].lineno}" if outside else reference
