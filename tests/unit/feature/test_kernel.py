from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.feature.define.definition import (
    Aggregate,
    Feature,
    Source,
    View,
    last_n,
    latest,
    quantile,
    top_k,
    windowed,
)
from services.feature.define.rows import Computed
from services.feature.define.sketches import code_of
from services.feature.tiles.kernel import LATEST_US, ViewKernel
from services.feature.tiles.state import DamagedState, ForeignState
from tests.unit.feature.oracle import Event, columns_of, largest, oracle

ALL = (A := Aggregate).COUNT, A.SUM, A.MEAN, A.STD, A.MIN, A.MAX, A.FIRST
S_US, M_US, H_US = 1_000_000, 60_000_000, 3_600_000_000
NOW_US = 1_384_000_000_000_000 // H_US * H_US

VISITS = Source("visits", "visits/*", "event_us", "known_us", "seq", ("shop", "city"), ("spent", "items"), ("till",))
REPAIRS = Source("repairs", "repairs/*", "event_us", "known_us", "seq", ("shop",), ("cost",))

EVERYTHING = View(
    "everything",
    "shop",
    (
        *windowed(VISITS, "spent", ALL, ("30s", "10m", "1h", "")),
        *windowed(VISITS, "items", (A.STD, A.MAX, A.SUM), ("10m",)),
        *windowed(VISITS, "", (A.COUNT,), ("10m", "")),
        *windowed(VISITS, "till", (A.DISTINCT,), ("10m", "")),
        *windowed(VISITS, "city", (A.DISTINCT,), ("1h",)),
        top_k(VISITS, "till", 3, "10m"),
        top_k(VISITS, "till", 2),
        quantile(VISITS, "spent", 0.9, "1h"),
        quantile(VISITS, "spent", 0.5, "1h"),
        quantile(VISITS, "items", 0.0),
        quantile(VISITS, "items", 1.0, "30s"),
        *latest(VISITS, "spent"),
        Feature(VISITS, A.LAST, "spent", "30s"),
        last_n(VISITS, "items", 4, "1h"),
        *windowed(REPAIRS, "cost", (A.MEAN, A.SUM), ("1h", "")),
        Feature(REPAIRS, A.MIN, "cost", "7d", "1d"),
        *latest(REPAIRS, "cost"),
    ),
)
# windows alone, recent events alone, and a row whose columns come in another order than they are worked out
TILES_ALONE = View("tiles_alone", "shop", windowed(VISITS, "spent", (A.STD, A.COUNT, A.MEAN), ("30s", "1h")))
RECENT_ALONE = View("recent_alone", "shop", (*latest(REPAIRS, "cost"), last_n(VISITS, "spent", 2)))
FIRSTS_ALONE = View("firsts_alone", "shop", (Feature(VISITS, A.FIRST, "items", "1h"), Feature(REPAIRS, A.AGE_S)))
BY_CITY = View("by_city", "city", (top_k(VISITS, "shop", 2, "1h"), *windowed(VISITS, "items", (A.MAX,), ("1h",))))
VIEWS = (EVERYTHING, TILES_ALONE, RECENT_ALONE, FIRSTS_ALONE, BY_CITY)

EXACT = (A.COUNT, A.MIN, A.MAX, A.FIRST, A.LAST, A.LAST_N, A.TOP_K, A.AGE_S)

History = Mapping[str, Sequence[Event]]

number = st.one_of(
    st.none(),
    st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-10, 1e15, -1e15, math.nan, math.inf, -math.inf, 2e300]),
    st.floats(-1e6, 1e6),
)
label = st.sampled_from([None, "", "a", "b", "c", "d", "é", "x" * 40])
# ties and the first and last microseconds of steps are what goes wrong
moment_us = st.builds(
    lambda steps, step_us, off: NOW_US + steps * step_us + off,
    st.integers(0, 40),
    st.sampled_from([S_US, 10 * S_US, M_US, 5 * M_US, H_US]),
    st.sampled_from([-1, 0, 0, 1, 500_000]),
)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, Event]]:
    """Events of both sources, in the order in which they arrive."""
    arrived: list[tuple[str, Event]] = []
    for sequence in draw(st.permutations(range(draw(st.integers(1, 40))))):
        source = draw(st.sampled_from(["visits", "visits", "repairs"]))
        known_us = draw(moment_us)
        ids = {"shop": draw(st.sampled_from(["here", "there", None]))}
        if source == "visits":
            ids["city"] = draw(st.sampled_from(["p", "q", None]))
            values, labels = {"spent": draw(number), "items": draw(number)}, {"till": draw(label)}
        else:
            values, labels = {"cost": draw(number)}, {}
        arrived.append((source, Event(sequence, known_us, known_us - S_US, ids, values, labels)))
    return arrived


def by_source(arrived: Sequence[tuple[str, Event]]) -> History:
    return {name: [event for source, event in arrived if source == name] for name in ("visits", "repairs")}


def counted(
    kernel: ViewKernel, arrived: Sequence[tuple[str, Event]], cuts: Sequence[int] = (), ids: Sequence[str] = ()
) -> dict[str, bytes | None]:
    """The states once the events have been applied in batches that end at `cuts`."""
    states: dict[str, bytes | None] = dict.fromkeys(ids)
    for begin, end in itertools.pairwise([0, *sorted(cuts), len(arrived)]):
        for name, events in by_source(arrived[begin:end]).items():
            if events:
                batch = columns_of(name, events)
                states |= dict.fromkeys(set(kernel.entities(batch)) - set(states))
                states |= kernel.apply(states, batch)
    return states


def assert_agree(view: View, history: History, entity: str, as_of_us: int, computed: Computed, row: int) -> None:
    """The row is what the oracle says of the entity."""
    expected = oracle(view, history, entity, as_of_us)
    assert computed.known[row] == (expected is not None)
    if expected is None:
        assert computed.null[row].all()
        return
    wanted, values, null = iter(expected), iter(computed.values[row].tolist()), iter(computed.null[row].tolist())
    for feature in view.features:
        tolerance = 0.0 if feature.aggregate in EXACT else 1e-9 * largest(view, history, feature)
        for column in feature.columns:
            want, value, is_null = next(wanted), next(values), next(null)
            assert is_null == (want is None), (column, want, value)
            if want is None or (math.isnan(want) and math.isnan(value)) or want == value:
                continue
            relative = 1e-9 * abs(want) if feature.aggregate not in EXACT else 0.0
            assert abs(value - want) <= tolerance + relative, (column, want, value)


def newest_us(arrived: Sequence[tuple[str, Event]]) -> int:
    return max(event.known_us for _, event in arrived)


after_us = st.one_of(
    st.just(1), st.integers(1, 2 * H_US), st.sampled_from([30 * S_US, 10 * M_US, H_US, H_US + 1, 8 * 24 * H_US])
)


@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
@given(arrived=histories(), cuts=st.lists(st.integers(0, 40), max_size=6), after=after_us)
def test_rows_are_what_the_definition_says_whatever_the_order_and_batches(
    view: View, arrived: list[tuple[str, Event]], cuts: list[int], after: int
) -> None:
    kernel = ViewKernel(view)
    ids = ("here", "there", "nobody") if view.entity == "shop" else ("p", "q", "nobody")
    states = counted(kernel, arrived, [cut for cut in cuts if cut <= len(arrived)], ids)
    as_of_us = newest_us(arrived) + after
    computed = kernel.rows([states[id_] for id_ in ids], as_of_us)
    for row, id_ in enumerate(ids):
        assert_agree(view, by_source(arrived), id_, as_of_us, computed, row)


@settings(deadline=None, max_examples=30)
@given(arrived=histories(), after=st.lists(after_us, min_size=3, max_size=3))
def test_every_entity_may_be_asked_at_a_moment_of_its_own(arrived: list[tuple[str, Event]], after: list[int]) -> None:
    kernel, ids = ViewKernel(EVERYTHING), ("there", "here", "nobody")
    states = counted(kernel, arrived, ids=ids)
    moments = [newest_us(arrived) + us for us in after]
    computed = kernel.rows([states[id_] for id_ in ids], moments)
    for row, (id_, as_of_us) in enumerate(zip(ids, moments, strict=True)):
        assert_agree(EVERYTHING, by_source(arrived), id_, as_of_us, computed, row)


def visit(sequence: int, known_us: int, spent: float | None = 1.0, shop: str = "here", till: str = "a") -> Event:
    values = {"spent": spent, "items": float(sequence)}
    return Event(sequence, known_us, known_us, {"shop": shop, "city": "p"}, values, {"till": till})


def visits(*events: Event) -> list[tuple[str, Event]]:
    return [("visits", event) for event in events]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 200), max_size=20), st.randoms(use_true_random=False))
def test_events_that_arrive_in_order_add_up_to_the_same_bits_however_they_are_batched(
    cuts: list[int], random_: random.Random
) -> None:
    kernel = ViewKernel(View("sums", "shop", windowed(VISITS, "spent", (A.SUM, A.MEAN, A.MIN), ("10m", "1h", ""))))
    arrived = visits(*(visit(n, NOW_US + n * 7 * S_US, random_.gauss(0, 1e6)) for n in range(200)))
    assert counted(kernel, arrived, cuts) == counted(kernel, arrived)


def test_a_huge_outlier_leaves_no_trace_once_its_window_is_over() -> None:
    kernel = ViewKernel(View("spread", "shop", windowed(VISITS, "spent", (A.STD, A.MEAN, A.SUM), ("1h",))))
    values = [1e15, -1e15, *(0.1 * n for n in range(10))]
    arrived = visits(*(visit(n, NOW_US + (n > 1) * 3 * H_US + n, value) for n, value in enumerate(values)))
    computed = kernel.rows([counted(kernel, arrived)["here"]], NOW_US + 3 * H_US + 100)
    np.testing.assert_allclose(computed.values[0], [np.std(values[2:]), np.mean(values[2:]), 4.5], rtol=1e-12)


def test_the_spread_of_large_values_that_lie_close_together_does_not_cancel() -> None:
    kernel = ViewKernel(View("spread", "shop", windowed(VISITS, "spent", (A.STD,), ("1h", ""))))
    values = [1e12 + n % 3 for n in range(300)]
    arrived = visits(*(visit(n, NOW_US + n * 10 * S_US, value) for n, value in enumerate(values)))
    computed = kernel.rows([counted(kernel, arrived, range(0, 300, 7))["here"]], NOW_US + H_US - 1)
    np.testing.assert_allclose(computed.values[0], np.std(np.array(values) - 1e12), rtol=1e-5)


def test_a_value_too_large_to_square_spreads_to_infinity_and_not_to_nan() -> None:
    kernel = ViewKernel(TILES_ALONE)
    arrived = visits(visit(0, NOW_US, 1e200), visit(1, NOW_US + H_US - 1, -1e200), visit(2, NOW_US + H_US - 1, 1.0))
    computed = kernel.rows([counted(kernel, arrived, [1, 2])["here"]], NOW_US + H_US)
    assert computed.values[0, TILES_ALONE.columns.index("spent_std_1h")] == math.inf


def test_an_event_at_a_position_that_is_counted_is_skipped() -> None:
    kernel = ViewKernel(EVERYTHING)
    events = columns_of("visits", [visit(n, NOW_US + n) for n in range(6)])
    positions = np.arange(10, 16)
    once = kernel.apply({"here": None}, events, positions)
    assert kernel.positions(once["here"]) == {"visits": 15, "repairs": -1}
    again = kernel.apply(once, events, positions)
    assert again == once
    first, overlapping = np.arange(4), np.arange(2, 6)
    state = kernel.apply({"here": None}, events.take(first), positions[:4])
    assert kernel.apply(state, events.take(overlapping), positions[2:]) == once


def test_a_position_that_comes_twice_in_a_batch_counts_once() -> None:
    kernel = ViewKernel(EVERYTHING)
    events = columns_of("visits", [visit(n, NOW_US + n) for n in range(3)])
    twice = events.take(np.array([0, 1, 1, 2, 0]))
    assert kernel.apply({"here": None}, twice, np.array([5, 6, 6, 7, 5])) == kernel.apply(
        {"here": None}, events, np.array([5, 6, 7])
    )


def test_without_positions_all_events_count_and_positions_stay() -> None:
    kernel = ViewKernel(EVERYTHING)
    events = columns_of("visits", [visit(0, NOW_US)])
    state = kernel.apply({"here": None}, events, np.array([7]))["here"]
    twice = kernel.apply({"here": state}, events)["here"]
    count = EVERYTHING.columns.index("visits_count")
    assert kernel.rows([twice], NOW_US + 1).values[0, count] == 2
    assert kernel.positions(twice) == {"visits": 7, "repairs": -1}


def test_a_state_may_be_set_to_positions() -> None:
    kernel = ViewKernel(EVERYTHING)
    state = kernel.apply({"here": None}, columns_of("visits", [visit(0, NOW_US)]))["here"]
    moved = kernel.at_positions(state, {"repairs": 9, "visits": 3})
    assert kernel.positions(moved) == {"visits": 3, "repairs": 9}
    assert kernel.at_positions(moved, {"repairs": -1, "visits": -1}) == state
    with pytest.raises(ValueError, match="positions must be of visits, repairs, got 'sales'"):
        kernel.at_positions(state, {"sales": 1})


def test_an_event_too_late_for_its_window_still_counts_for_all_time() -> None:
    view = View("counts", "shop", windowed(VISITS, "spent", (A.COUNT, A.FIRST), ("10m", "")))
    kernel = ViewKernel(view)
    arrived = visits(visit(0, NOW_US), visit(1, NOW_US + H_US), visit(2, NOW_US - H_US, 5.0))
    state = counted(kernel, arrived, [1, 2])["here"]
    assert kernel.rows([state], NOW_US + H_US + 1).values.tolist() == [[1.0, 1.0, 3.0, 5.0]]
    assert kernel.rows([state], NOW_US + H_US).known.tolist() == [True]


def test_a_state_is_the_same_whenever_an_event_came_that_no_window_reaches() -> None:
    kernel = ViewKernel(EVERYTHING)
    old, new = visit(0, NOW_US - 9 * 24 * H_US, 4.0), visit(1, NOW_US)
    assert counted(kernel, visits(old, new), [1]) == counted(kernel, visits(new, old), [1])


def test_a_state_does_not_grow_with_time() -> None:
    kernel = ViewKernel(TILES_ALONE)
    sizes, states = [], {"here": None}
    for hour in range(1, 9):
        events = [visit(n, NOW_US + hour * H_US + n * S_US) for n in range(3600)]
        states = kernel.apply(states, columns_of("visits", events))
        sizes.append(len(states["here"]))
    assert max(sizes[1:]) == min(sizes[1:])


def test_a_moment_up_to_a_step_before_the_newest_event_still_has_its_whole_window() -> None:
    view = View("counts", "shop", (*windowed(VISITS, "", (A.COUNT,), ("1h",)), *latest(VISITS, "items")))
    kernel = ViewKernel(view)
    arrived = visits(*(visit(n, NOW_US + n * M_US) for n in range(120)))  # steps are 5 minutes
    state = counted(kernel, arrived)["here"]
    as_of_us = NOW_US + 115 * M_US
    assert kernel.rows([state], as_of_us).values[0, 0] == 60
    assert kernel.rows([state], as_of_us).null[0].tolist() == [False, True, True]  # one latest event is kept


def test_latest_events_that_became_known_later_than_the_moment_are_left_out() -> None:
    kernel = ViewKernel(View("lasts", "shop", (last_n(VISITS, "items", 3), *latest(REPAIRS, "cost"))))
    states = counted(kernel, visits(*(visit(n, NOW_US + n) for n in range(5)), visit(7, NOW_US + 9, shop="there")))
    computed = kernel.rows([states["there"], states["here"]], NOW_US + 4)
    assert computed.null.tolist() == [[True] * 5, [False, False, True, True, True]]
    assert computed.values[1, :2].tolist() == [3.0, 2.0]
    assert computed.known.tolist() == [False, True]


def test_each_source_has_latest_events_of_its_own() -> None:
    kernel = ViewKernel(View("lasts", "shop", (Feature(VISITS, A.LAST, "items"), Feature(REPAIRS, A.LAST, "cost"))))
    repair = Event(1, NOW_US + 5, NOW_US + 5, {"shop": "here"}, {"cost": 4.0})
    states = counted(kernel, [*visits(visit(0, NOW_US), visit(9, NOW_US + 10)), ("repairs", repair)])
    computed = kernel.rows([states["here"]], NOW_US + 8)
    assert computed.null.tolist() == [[True, False]]  # of visits one is kept, and that was not known
    assert computed.values[0, 1] == 4.0
    assert kernel.rows([states["here"]], NOW_US + 11).values.tolist() == [[9.0, 4.0]]


def test_nothing_is_known_before_the_first_event() -> None:
    kernel = ViewKernel(EVERYTHING)
    states = counted(kernel, visits(visit(0, NOW_US)))
    assert kernel.rows([states["here"]] * 2, [NOW_US, NOW_US + 1]).known.tolist() == [False, True]
    assert kernel.known_us([states["here"], None]).tolist() == [NOW_US, 0]


def test_ties_in_time_are_ordered_by_sequence() -> None:
    kernel = ViewKernel(View("ends", "shop", (Feature(VISITS, A.FIRST, "spent"), Feature(VISITS, A.LAST, "spent"))))
    arrived = visits(visit(2, NOW_US, 2.0), visit(3, NOW_US, None), visit(1, NOW_US, math.nan))
    for order in itertools.permutations(arrived):
        computed = kernel.rows([counted(kernel, order, [1, 2])["here"]], NOW_US + 1)
        assert math.isnan(computed.values[0, 0])
        assert computed.null.tolist() == [[False, True]]


def test_a_tile_keeps_the_most_frequent_codes() -> None:
    kernel = ViewKernel(View("tops", "shop", (top_k(VISITS, "till", 2), quantile(VISITS, "spent", 0.5))))
    often = [visit(n, NOW_US + n, till=till) for n, till in enumerate(["x", "y", "x"])]
    rare = [visit(n, NOW_US + n, till=str(n)) for n in range(3, 5000)]
    state = counted(kernel, visits(*often, *often, *rare))["here"]
    assert kernel.rows([state], NOW_US + H_US).values[0, :2].tolist() == [code_of("x"), code_of("y")]
    assert len(state) < 1100 * 8


def test_a_view_without_the_source_of_the_events_is_not_concerned() -> None:
    kernel = ViewKernel(TILES_ALONE)
    repairs = columns_of("repairs", [Event(1, NOW_US, NOW_US, {"shop": "here"}, {"cost": 1.0})])
    assert kernel.entities(repairs) == []
    assert kernel.apply({}, repairs) == {}


def test_no_events_and_no_entities_are_no_trouble() -> None:
    kernel = ViewKernel(EVERYTHING)
    numbers = {"spent": 1.0, "items": 1.0}
    nowhere = columns_of("visits", [Event(1, NOW_US, NOW_US, {"shop": None, "city": None}, numbers, {"till": "a"})])
    assert kernel.apply({}, nowhere.take(np.array([], dtype=np.int64))) == {}
    assert kernel.apply({}, nowhere, np.array([1])) == {}
    assert kernel.rows([], NOW_US).values.shape == (0, len(EVERYTHING.columns))


def test_many_entities_are_read_as_one_is() -> None:
    kernel, ids = ViewKernel(EVERYTHING), [f"shop {n}" for n in range(300)]
    rng = random.Random(5)
    arrived = visits(*(visit(n, NOW_US + rng.randrange(H_US), rng.gauss(0, 9), rng.choice(ids)) for n in range(900)))
    states = counted(kernel, arrived, range(0, 900, 100), ids)
    together = kernel.rows([states[id_] for id_ in ids], NOW_US + H_US)
    for row, id_ in enumerate(ids):
        alone = kernel.rows([states[id_]], NOW_US + H_US)
        np.testing.assert_array_equal(alone.null[0], together.null[row])
        np.testing.assert_array_equal(alone.values[~alone.null], together.values[row][~together.null[row]])


def test_an_unreadable_state_is_of_an_unknown_entity_and_is_told() -> None:
    kernel = ViewKernel(EVERYTHING)
    state = counted(kernel, visits(visit(0, NOW_US)))["here"]
    foreign = counted(ViewKernel(TILES_ALONE), visits(visit(0, NOW_US)))["here"]
    assert state is not None
    computed = kernel.rows([state[:-1], state, foreign, b""], NOW_US + 1)
    assert computed.known.tolist() == [False, True, False, False]
    assert computed.null[[0, 2, 3]].all()
    assert (kernel.damaged, kernel.foreign) == (2, 1)
    with pytest.raises(DamagedState):
        kernel.check(b"")
    with pytest.raises(ForeignState):
        kernel.check(foreign or b"")


def test_an_unreadable_state_is_never_continued() -> None:
    kernel = ViewKernel(EVERYTHING)
    events = columns_of("visits", [visit(0, NOW_US)])
    with pytest.raises(DamagedState, match="entity 'here'"):
        kernel.apply({"here": b"tfs\x01"}, events)
    foreign = counted(ViewKernel(TILES_ALONE), visits(visit(0, NOW_US)))
    with pytest.raises(ForeignState, match=r"entity 'here': a state of view 'everything' has schema [0-9a-f]{16}, exp"):
        kernel.apply(foreign, events)


def test_what_cannot_be_is_named() -> None:
    kernel = ViewKernel(EVERYTHING)
    events = columns_of("visits", [visit(0, NOW_US)])
    with pytest.raises(ValueError, match="must hold every entity that the events concern, got none for 'here'"):
        kernel.apply({"there": None}, events)
    with pytest.raises(ValueError, match=r"positions must have shape \(1,\), got \(2,\)"):
        kernel.apply({"here": None}, events, np.array([1, 2]))
    without = columns_of("visits", [Event(0, NOW_US, NOW_US, {"shop": "here", "city": "p"}, {"items": 1.0})])
    with pytest.raises(ValueError, match="events of 'visits' must be prepared and have 'spent'"):
        kernel.apply({"here": None}, without)
    for wrong_us in (-1, LATEST_US + 1):
        with pytest.raises(ValueError, match=f"known_us must be from 0 to 2[*][*]53, got {wrong_us}"):
            kernel.apply({"here": None}, columns_of("visits", [visit(0, wrong_us)]))
        with pytest.raises(ValueError, match=f"as_of_us must be from 0 to 2[*][*]53, got {wrong_us}"):
            kernel.rows([None], wrong_us)
        with pytest.raises(ValueError, match=f"as_of_us must be from 0 to 2[*][*]53, got {wrong_us}"):
            kernel.rows([None], [wrong_us])
    with pytest.raises(ValueError, match="as_of_us must be one moment or 1, got shape"):
        kernel.rows([None], [NOW_US, NOW_US])


def test_states_survive_changes_that_do_not_touch_what_is_kept() -> None:
    def kernel(default: float | None, *windows: str) -> ViewKernel:
        return ViewKernel(View("v", "shop", windowed(VISITS, "spent", (A.MEAN,), windows, default=default)))

    assert kernel(None, "1h").schema_hash == kernel(0.0, "1h").schema_hash
    assert kernel(None, "2h").schema_hash != kernel(None, "1h").schema_hash  # reaches further
    assert kernel(None, "2h", "1h").schema_hash == kernel(None, "2h").schema_hash
