"""A folder of models, and what is served of it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from services.inference.backend import LoadError
from services.inference.batcher import Limits
from services.inference.repository import Entry, Repository, is_name, scan
from services.inference.tensors import DATATYPES, Array, Inputs, TensorSpec
from services.resilience.call import Caller
from services.resilience.errors import NotFound, Unavailable


class Adding:
    """A backend that adds the number in its file."""

    provider = "FakeExecutionProvider"
    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        try:
            self._addend = float(path.read_text())
        except ValueError as error:
            raise LoadError(f"not a number: {path.read_text()!r}") from error
        self.inputs = [TensorSpec("x", DATATYPES["FP32"], (-1,))]
        self.outputs = [TensorSpec("y", DATATYPES["FP32"], (-1,))]

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        return [np.asarray(feeds["x"] + self._addend, np.float32)]


class Shelf:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: list[str] = []
        self.repository = self.open()

    def open(self, **pins: int) -> Repository:
        def load(path: Path) -> Adding:
            self.loaded.append(str(path.parent.relative_to(self.root)))
            return Adding(path)

        return Repository(self.root, load, Limits(), pins)

    def put(self, name: str, version: int | str, content: str) -> Path:
        path = self.root / name / str(version) / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    shelf = Shelf(tmp_path)
    yield shelf
    await shelf.repository.close()


async def ask(repository: Repository, name: str) -> float:
    model = repository.find(name)
    share = await model.runner.infer(Inputs(1, ((),), [bytes(4)]), Caller())
    return float(np.frombuffer(share.outputs.raw(0, share.start, 1), np.float32)[0])


async def test_the_newest_version_is_served(shelf: Shelf) -> None:
    for version in (2, 10, 9):
        shelf.put("m", version, str(version))
    await shelf.repository.refresh()
    assert shelf.repository.find("m").version == "10"
    assert await ask(shelf.repository, "m") == 10
    assert shelf.loaded == ["m/10"]


async def test_a_pin_holds_a_model_on_its_version(shelf: Shelf) -> None:
    shelf.repository = shelf.open(m=2)
    for version in (1, 2, 3):
        shelf.put("m", version, str(version))
    await shelf.repository.refresh()
    assert await ask(shelf.repository, "m") == 2


async def test_a_pin_on_a_version_that_is_not_there_is_told(shelf: Shelf) -> None:
    shelf.repository = shelf.open(m=7)
    shelf.put("m", 1, "1")
    await shelf.repository.refresh()
    with pytest.raises(Unavailable, match="version 7 is pinned and not there"):
        shelf.repository.find("m")


async def test_a_corrupt_file_harms_no_other_model(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shelf.put("bad", 1, "???")
    shelf.put("good", 1, "1")
    await shelf.repository.refresh()
    assert await ask(shelf.repository, "good") == 1
    with pytest.raises(Unavailable, match=r"model 'bad' is not ready: not a number: '\?\?\?'"):
        shelf.repository.find("bad")
    assert [(r.getMessage(), r.__dict__["model"]) for r in caplog.records if r.levelname == "ERROR"] == [
        ("model not ready", "bad")
    ]
    assert shelf.repository.index() == [
        Entry("bad", "1", ready=False, reason="not a number: '???'"),
        Entry("good", "1", ready=True, reason=""),
    ]


async def test_a_corrupt_file_is_tried_again_only_when_it_changed(shelf: Shelf) -> None:
    path = shelf.put("m", 1, "???")
    for _ in range(3):
        await shelf.repository.refresh()
    assert shelf.loaded == ["m/1"]
    path.write_text("5")
    os.utime(path, ns=(1, 1))
    await shelf.repository.refresh()
    assert await ask(shelf.repository, "m") == 5


async def test_a_new_version_takes_over_and_a_corrupt_one_does_not(shelf: Shelf) -> None:
    shelf.put("m", 1, "1")
    await shelf.repository.refresh()
    shelf.put("m", 2, "2")
    await shelf.repository.refresh()
    assert await ask(shelf.repository, "m") == 2
    shelf.put("m", 3, "???")
    await shelf.repository.refresh()
    assert await ask(shelf.repository, "m") == 2
    assert shelf.repository.index()[1] == Entry("m", "3", ready=False, reason="not a number: '???'")


async def test_a_call_that_waits_is_answered_by_the_version_that_accepted_it(shelf: Shelf) -> None:
    shelf.put("m", 1, "1")
    await shelf.repository.refresh()
    old = shelf.repository.find("m")
    gate = threading.Event()
    held = old.backend.run
    old.runner._backend.run = lambda feeds: (gate.wait(30), held(feeds))[1]  # type: ignore[method-assign]
    old.runner._batcher.estimate.fixed_s = 1.0  # long: on the thread
    asked = asyncio.create_task(ask(shelf.repository, "m"))
    await asyncio.sleep(0)
    shelf.put("m", 2, "2")
    await shelf.repository.refresh()
    assert await ask(shelf.repository, "m") == 2
    assert not asked.done()
    gate.set()
    assert await asked == 1


async def test_taking_the_newest_version_away_brings_the_one_before_back(shelf: Shelf) -> None:
    shelf.put("m", 1, "1")
    newest = shelf.put("m", 2, "2")
    await shelf.repository.refresh()
    newest.unlink()
    await shelf.repository.refresh()
    assert await ask(shelf.repository, "m") == 1


async def test_a_model_that_is_taken_away_is_no_longer_found(shelf: Shelf) -> None:
    shelf.put("keep", 1, "1")
    path = shelf.put("gone", 1, "1")
    await shelf.repository.refresh()
    path.unlink()
    path.parent.rmdir()
    path.parent.parent.rmdir()
    await shelf.repository.refresh()
    with pytest.raises(NotFound, match="no model 'gone'; there are keep"):
        shelf.repository.find("gone")


async def test_an_unknown_version_is_not_found(shelf: Shelf) -> None:
    shelf.put("m", 2, "1")
    await shelf.repository.refresh()
    with pytest.raises(NotFound, match="model 'm' has no version '1' here; it serves version '2'"):
        shelf.repository.find("m", "1")


async def test_ready_means_that_one_model_answers(shelf: Shelf) -> None:
    shelf.put("m", 1, "???")
    await shelf.repository.refresh()
    assert not shelf.repository.ready
    waiting = asyncio.create_task(shelf.repository.any_ready())
    await asyncio.sleep(0)
    assert not waiting.done()
    shelf.put("m", 2, "2")
    await shelf.repository.refresh()
    await waiting
    assert shelf.repository.ready


def test_only_folders_named_like_a_model_and_a_version_are_looked_at(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    for name, version in (("m", "1"), ("m", "01"), ("m", "x"), ("m", "-1"), (".hidden", "1"), ("a b", "1")):
        shelf.put(name, version, "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert {name: [found.version for found in versions] for name, versions in scan(tmp_path).items()} == {
        "m": [1],
        "empty": [],
    }


def test_only_a_plain_file_is_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "m" / "1" / "model.onnx").mkdir(parents=True)
    (tmp_path / "m" / "2").mkdir()
    os.mkfifo(tmp_path / "m" / "2" / "model.onnx")
    assert scan(tmp_path) == {"m": []}


@pytest.mark.parametrize("name", ["", ".", "..", "../m", "a/b", "/etc", "m\0", "m\n", "a" * 129])
def test_a_name_that_leads_elsewhere_is_none(name: str) -> None:
    assert not is_name(name)
