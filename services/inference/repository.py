"""The models of a folder: <root>/<name>/<version>/model.onnx.

The newest version that loads is served, or the pinned one. A version takes traffic once it is loaded and warm; the
one before answers what it already accepted and is then let go. A file that cannot be loaded harms no other model.
"""

from __future__ import annotations

import asyncio
import logging
import re
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from services.inference.backend import ExecutionBackend, LoadError, warm_up
from services.inference.batcher import Limits
from services.inference.runner import Runner
from services.inference.tensors import Answers, Signature
from services.resilience.errors import NotFound, Unavailable

log = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

Load = Callable[[Path], ExecutionBackend]


def is_name(text: str) -> bool:
    """Whether a model may be called so: a plain folder name that leads nowhere else."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Model:
    """One version of a model, loaded and warm."""

    name: str
    version: str
    backend: ExecutionBackend
    signature: Signature
    runner: Runner
    answers: Answers


class Found(NamedTuple):
    """A version in the folder. fingerprint: changes when its file does."""

    version: int
    path: Path
    fingerprint: tuple[int, int]


class Entry(NamedTuple):
    """A line of the index. reason: why it is not ready."""

    name: str
    version: str
    ready: bool
    reason: str


def scan(root: Path) -> dict[str, list[Found]]:
    """Every model's versions, newest first. Folders that are not named like a model or a version are passed over."""
    models: dict[str, list[Found]] = {}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and is_name(folder.name):
            versions = [_found(child) for child in folder.iterdir() if _VERSION.fullmatch(child.name)]
            models[folder.name] = sorted((found for found in versions if found is not None), reverse=True)
    return models


def _found(folder: Path) -> Found | None:
    path = folder / MODEL_FILE
    try:
        status = path.stat()
    except OSError:  # not there yet: whoever copies it may have made only the folder
        return None
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever, and no other model would be loaded
        return None
    return Found(int(folder.name), path, (status.st_mtime_ns, status.st_size))


class Repository:
    """What is served, kept in step with the folder. Belongs to one event loop; a thread of its own reads files."""

    def __init__(self, root: Path, load: Load, limits: Limits, pins: Mapping[str, int] | None = None) -> None:
        """pins: the one version of a model that may be served, by name."""
        self._root, self._load, self._limits, self._pins = root, load, limits, dict(pins or {})
        self._served: dict[str, Model] = {}
        self._failed: dict[tuple[str, int], tuple[tuple[int, int], str]] = {}
        self._known: dict[str, list[Found]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._any_ready = asyncio.Event()

    @property
    def ready(self) -> bool:
        return bool(self._served)

    def models(self) -> Sequence[Model]:
        """Everything that is served."""
        return list(self._served.values())

    def find(self, name: str, version: str = "") -> Model:
        """The model to ask. Raises NotFound, or Unavailable where it exists and could not be loaded."""
        model = self._served.get(name)
        if model is not None and version in ("", model.version):
            return model
        if model is not None:
            raise NotFound(f"model {name!r} has no version {version!r} here; it serves version {model.version!r}")
        if name in self._known:
            raise Unavailable(f"model {name!r} is not ready: {self._why_not(name)}")
        raise NotFound(f"no model {name!r}; there are {', '.join(sorted(self._served)) or 'none'}")

    def index(self) -> list[Entry]:
        """Every version that is in the folder or served."""
        entries = []
        for name in sorted(self._known.keys() | self._served.keys()):
            serving = self._served.get(name)
            if serving is not None:
                entries.append(Entry(name, serving.version, ready=True, reason=""))
            entries += [
                Entry(name, str(found.version), ready=False, reason=self._reason(name, found))
                for found in self._known.get(name, [])
                if serving is None or str(found.version) != serving.version
            ]
            if serving is None and not self._known.get(name):
                entries.append(Entry(name, "", ready=False, reason=self._why_not(name)))
        return entries

    async def any_ready(self) -> None:
        """Returns once a model can answer."""
        if not self._served:
            log.warning("no model could be loaded; waiting for one", extra={"root": str(self._root)})
        await self._any_ready.wait()

    async def refresh(self) -> None:
        """Brings what is served in step with the folder."""
        loop = asyncio.get_running_loop()
        try:
            self._known = await loop.run_in_executor(self._thread, scan, self._root)
        except OSError as error:
            log.warning("the model repository cannot be read", extra={"root": str(self._root), "reason": str(error)})
            return
        for name, versions in self._known.items():
            await self._choose(name, versions)
        for name in self._served.keys() - {name for name, versions in self._known.items() if versions}:
            log.info("model removed", extra={"model": name})
            self._retire(self._served.pop(name))

    async def watch(self, every_s: float) -> None:
        """Refreshes for ever."""
        while True:
            await asyncio.sleep(every_s)
            await self.refresh()

    async def close(self) -> None:
        """Answers what was accepted, then lets every model go."""
        for name in list(self._served):
            self._retire(self._served.pop(name))
        if self._retiring:
            await asyncio.wait(self._retiring)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _choose(self, name: str, versions: Sequence[Found]) -> None:
        """Serves the first of `versions` that loads; what failed before is tried again only when its file changed."""
        pinned = self._pins.get(name)
        for found in versions:
            if pinned is not None and found.version != pinned:
                continue
            serving = self._served.get(name)
            if serving is not None and serving.version == str(found.version):
                return
            if self._failed.get((name, found.version), (None, ""))[0] == found.fingerprint:
                continue
            try:
                model = await self._loaded(name, found)
            except LoadError as error:
                self._reject(name, found, str(error))
                continue
            except Exception as error:
                log.exception("loading a model failed in a way nobody foresaw")
                self._reject(name, found, type(error).__name__)
                continue
            self._failed.pop((name, found.version), None)
            self._serve(model)
            return

    async def _loaded(self, name: str, found: Found) -> Model:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()

        def load() -> Model:
            backend = self._load(found.path)
            warmed = warm_up(backend, self._limits)
            answers = Answers(name, str(found.version), warmed.signature)
            runner = Runner(backend, warmed.signature, self._limits, warmed.estimate)
            if warmed.note:
                log.warning(warmed.note, extra={"model": name, "version": found.version})
            return Model(name, str(found.version), backend, warmed.signature, runner, answers)

        model = await loop.run_in_executor(self._thread, load)
        seconds = round(time.perf_counter() - started, 3)
        extra = {"model": name, "version": found.version, "provider": model.backend.provider, "load_s": seconds}
        log.info("model warmed", extra=extra)
        return model

    def _reject(self, name: str, found: Found, reason: str) -> None:
        self._failed[name, found.version] = (found.fingerprint, reason)
        log.error("model not ready", extra={"model": name, "version": found.version, "reason": reason})

    def _serve(self, model: Model) -> None:
        before = self._served.get(model.name)
        self._served[model.name] = model
        self._any_ready.set()
        if before is not None:
            log.info("model replaced", extra={"model": model.name, "version": model.version, "was": before.version})
            self._retire(before)

    def _retire(self, model: Model) -> None:
        async def drain() -> None:
            await model.runner.drain()
            model.runner.close()

        task = asyncio.get_running_loop().create_task(drain())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _why_not(self, name: str) -> str:
        pinned = self._pins.get(name)
        versions = [found for found in self._known[name] if pinned in (None, found.version)]
        if versions:
            return self._reason(name, versions[0])
        return f"version {pinned} is pinned and not there" if pinned else f"it has no <version>/{MODEL_FILE}"

    def _reason(self, name: str, found: Found) -> str:
        _, reason = self._failed.get((name, found.version), (None, ""))
        return reason or ("another version is served" if name in self._served else "it is being loaded")
