from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest

from services.fallback.answers import (
    LastGood,
    Memory,
    Prior,
    Remembered,
    SmallModel,
    Unusable,
    answers_for,
)
from services.mesh.meshfile import FallbackAnswer, Model, RequiredQuality, Tier
from services.mesh.query import Query
from tenfold.router.v1.router_pb2 import PredictRequest
from tests.contract.standins import OUTPUT, PRIOR, write_artefacts

MODEL = Model("delay", OUTPUT, [Tier("t", "m", 0.8, 1.0, 10)], RequiredQuality(0.5, 0.5, 0.5))
NOW_US = 1_700_000_000_000_000
LAST_GOOD = FallbackAnswer("last_good", entity="route", max_age_s=60.0, usd_per_1000=0.5)
ONNX = FallbackAnswer("onnx", path="small.onnx", usd_per_1000=0.1)
PRIOR_RULE = FallbackAnswer("prior", path="prior.json")


def query(
    entities: Mapping[str, str] | None = None,
    numbers: Mapping[str, float] | None = None,
    texts: Mapping[str, str] | None = None,
    as_of_us: int = 0,
) -> Query:
    return Query(PredictRequest(as_of_us=as_of_us), MODEL, entities or {}, numbers or {}, texts or {})


def good(value: float, answered_us: int) -> Remembered:
    return Remembered([(OUTPUT, [value])], "m", "3", answered_us)


def last_good(answered_us: int) -> LastGood:
    memory = Memory(10)
    memory.keep("delay", "a", good(0.7, answered_us))
    return LastGood(LAST_GOOD, memory, lambda: NOW_US)


def test_the_last_good_answer_is_repeated_with_its_age_and_its_model() -> None:
    (answer,) = last_good(NOW_US - 30_000_000)([query({"route": "a"})])
    assert answer is not None
    assert (answer.outputs, answer.source, answer.age_s) == ([(OUTPUT, [0.7])], "last_good", 30.0)
    assert (answer.model, answer.version, answer.provider) == ("m", "3", "")
    assert answer.cost_usd == 0.0005


@pytest.mark.parametrize(("age_s", "repeated"), [(60, True), (61, False), (0, True), (-4, True), (-6, False)], ids=str)
def test_an_answer_is_repeated_only_while_it_is_young_and_never_from_the_future(age_s: int, repeated: bool) -> None:
    (answer,) = last_good(NOW_US - age_s * 1_000_000)([query({"route": "a"})])
    assert (answer is not None) is repeated
    if answer is not None:
        assert answer.age_s == max(0, age_s)


def test_a_replay_is_answered_by_what_was_known_then() -> None:
    ask = last_good(NOW_US)
    then = [NOW_US + 30_000_000, NOW_US - 30_000_000, NOW_US + 90_000_000]
    answers = ask([query({"route": "a"}, as_of_us=as_of_us) for as_of_us in then])
    assert [answer.age_s if answer else None for answer in answers] == [30.0, None, None]


def test_an_unknown_or_missing_entity_has_no_last_answer() -> None:
    assert last_good(NOW_US)([query({"route": "b"}), query({"tail": "a"})]) == [None, None]


def test_the_newest_answer_wins_whatever_the_order_of_arrival() -> None:
    memory = Memory(10)
    assert [memory.keep("delay", "a", good(at, at)) for at in (200, 100, 300, 300)] == [True, False, True, True]
    kept = memory.get("delay", "a")
    assert kept is not None
    assert kept.answered_us == 300


def test_memory_is_bounded_and_forgets_what_was_not_given_for_longest() -> None:
    memory = Memory(3)
    for name in "abc":
        memory.keep("delay", name, good(0, 100))
    memory.keep("delay", "a", good(0, 200))
    memory.keep("delay", "d", good(0, 100))
    assert len(memory) == 3
    assert memory.get("delay", "b") is None
    assert memory.get("delay", "a") is not None


def test_the_small_model_runs_on_the_request_alone(tmp_path: Path) -> None:
    write_artefacts(tmp_path)
    small = SmallModel(ONNX, OUTPUT, tmp_path / "small.onnx")
    answers = small(
        [query({"origin": "EWR"}, {"hour": 17.0}), query({"origin": "JFK"}, {"hour": 4.0}), query({"origin": "EWR"})]
    )
    values = [answer.outputs[0][1][0] for answer in answers if answer]
    assert values == pytest.approx([0.67, 0.04, 0.5])
    first = answers[0]
    assert first is not None
    assert (first.source, first.model, first.provider) == ("onnx", "small", "CPUExecutionProvider")
    assert first.cost_usd == pytest.approx(0.0001)


def test_a_small_model_that_answers_no_number_has_no_answer_for_that_request_alone(tmp_path: Path) -> None:
    write_artefacts(tmp_path)
    model = onnx.load(tmp_path / "small.onnx")
    model.graph.node[1].CopyFrom(onnx.helper.make_node("Where", ["null", "features", "features"], ["filled"]))
    onnx.save(model, tmp_path / "small.onnx")
    small = SmallModel(ONNX, OUTPUT, tmp_path / "small.onnx")
    without, with_hour = small([query(), query(numbers={"hour": 1.0})])
    assert without is None
    assert with_hour is not None


def rewritten(tmp_path: Path, columns: str) -> Path:
    write_artefacts(tmp_path)
    path = tmp_path / "small.onnx"
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"tenfold.columns": columns})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ('["route.late", "input.hour"]', "it may read input.<name> and entity.<name> only"),
        ("", "tenfold.columns must be a JSON list"),
        ("[]", "it may read"),
        ("[1, 2]", "tenfold.columns must be a JSON list"),
    ],
)
def test_a_small_model_that_reads_more_than_the_request_is_unusable(tmp_path: Path, columns: str, problem: str) -> None:
    with pytest.raises(Unusable, match=problem):
        SmallModel(ONNX, OUTPUT, rewritten(tmp_path, columns))


def test_a_small_model_without_the_models_output_or_that_is_no_model_is_unusable(tmp_path: Path) -> None:
    write_artefacts(tmp_path)
    with pytest.raises(Unusable, match="must have an output 'price', got late_probability"):
        SmallModel(ONNX, "price", tmp_path / "small.onnx")
    (tmp_path / "small.onnx").write_bytes(b"not a model")
    with pytest.raises(Unusable, match=r"small\.onnx"):
        SmallModel(ONNX, OUTPUT, tmp_path / "small.onnx")


def prior(tmp_path: Path, document: object = PRIOR) -> Prior:
    path = tmp_path / "prior.json"
    path.write_text(json.dumps(document))
    return Prior(PRIOR_RULE, path)


@pytest.mark.parametrize(
    ("entities", "numbers", "value", "detail"),
    [
        ({"origin": "EWR"}, {"hour": 17.0}, 0.5, "the average by origin, hour"),
        ({"origin": "EWR"}, {"hour": 18.0}, 0.375, "the average by origin"),
        ({"origin": "EWR"}, {"hour": 17.5}, 0.375, "the average by origin"),
        ({"origin": "EWR"}, {"hour": math.nan}, 0.375, "the average by origin"),
        ({"origin": "EWR"}, {}, 0.375, "the average by origin"),
        ({"origin": "LGA"}, {"hour": 17.0}, 0.25, "the average over everything"),
        ({}, {}, 0.25, "the average over everything"),
    ],
)
def test_the_prior_answers_by_its_most_specific_table(
    tmp_path: Path, entities: dict[str, str], numbers: dict[str, float], value: float, detail: str
) -> None:
    (answer,) = prior(tmp_path)([query(entities, numbers)])
    assert answer is not None
    assert (answer.outputs, answer.detail, answer.source) == ([(OUTPUT, [value])], detail, "prior")


def test_a_prior_by_a_text_input_finds_it(tmp_path: Path) -> None:
    document = {"output": OUTPUT, "default": [0.1], "tables": [{"by": ["input.kind"], "values": {"jet": [0.9]}}]}
    (answer,) = prior(tmp_path, document)([query(texts={"kind": "jet"})])
    assert answer is not None
    assert answer.outputs == [(OUTPUT, [0.9])]


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"output": OUTPUT, "default": [0.1]},
        {"output": OUTPUT, "default": [], "tables": []},
        {"output": OUTPUT, "default": [math.nan], "tables": []},
        {"output": OUTPUT, "default": [0.1], "tables": [{"by": ["input.a"], "values": {"x": ["much"]}}]},
        {"output": OUTPUT, "default": [0.1], "tables": [{"by": ["route.late"], "values": {}}]},
    ],
)
def test_a_prior_that_is_not_one_is_unusable(tmp_path: Path, document: object) -> None:
    with pytest.raises(Unusable, match=r"prior\.json"):
        prior(tmp_path, document)


def test_what_is_missing_is_left_out_and_the_rest_keeps_its_order(tmp_path: Path) -> None:
    write_artefacts(tmp_path)
    (tmp_path / "small.onnx").unlink()
    other = FallbackAnswer("last_good", entity="tail")
    usable, unusable = answers_for([LAST_GOOD, ONNX, PRIOR_RULE, other], OUTPUT, tmp_path, Memory(1), lambda: NOW_US)
    assert [type(ask) for ask in usable] == [LastGood, Prior]
    assert unusable == {
        "onnx": f"there is no file {tmp_path / 'small.onnx'}",
        "last_good": "answers are remembered by route, not by tail",
    }
