"""Who runs next, with whom, and who is turned away."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.batcher import Batcher, Estimate, Limits, Member, Placement
from services.resilience.call import Priority
from services.resilience.errors import DeadlineExceeded, Refused

NEVER = float("inf")


def takes(fixed_s: float, per_row_s: float) -> Estimate:
    estimate = Estimate()
    estimate.fixed_s, estimate.per_row_s = fixed_s, per_row_s
    return estimate


def member(
    name: str = "",
    *,
    priority: Priority = Priority.STANDARD,
    deadline: float = NEVER,
    rows: int = 1,
    key: object = (),
) -> Member[str]:
    return Member(name, rows, priority, deadline, 0.0, key)


def names(members: list[Member[str]]) -> list[str]:
    return [each.work for each in members]


def test_everything_that_waits_leaves_in_one_batch() -> None:
    batcher: Batcher[str] = Batcher(Limits(), takes(0, 0))
    for name in "abc":
        batcher.push(member(name), 0.0)
    assert names(batcher.next_batch(0.0).members) == ["a", "b", "c"]
    assert len(batcher) == 0


def test_priority_goes_before_deadline_and_deadline_before_arrival() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_rows=1), takes(0, 0))
    batcher.push(member("late", deadline=9), 0.0)
    batcher.push(member("soon", deadline=5), 0.0)
    batcher.push(member("background", priority=Priority.BACKGROUND, deadline=1), 0.0)
    batcher.push(member("critical", priority=Priority.CRITICAL), 0.0)
    served = [names(batcher.next_batch(0.0).members)[0] for _ in range(4)]
    assert served == ["critical", "soon", "late", "background"]


def test_a_batch_has_at_most_max_rows() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_rows=4), takes(0, 0))
    for name in "abc":
        batcher.push(member(name, rows=2), 0.0)
    assert names(batcher.next_batch(0.0).members) == ["a", "b"]
    assert names(batcher.next_batch(0.0).members) == ["c"]


def test_a_batch_never_makes_its_most_urgent_member_late() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_run_s=1), takes(0, 0.010))
    batcher.push(member("urgent", priority=Priority.CRITICAL, deadline=0.040), 0.0)
    for name in "abcdefgh":
        batcher.push(member(name), 0.0)
    batch = batcher.next_batch(0.0)
    assert names(batch.members) == ["urgent", "a", "b"]  # a fourth row would be ready after 48 ms at worst
    assert batch.predicted_s == pytest.approx(0.030)


def test_a_batch_does_not_run_longer_than_max_run_s() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_run_s=0.025), takes(0, 0.010))
    for name in "abcd":
        batcher.push(member(name), 0.0)
    assert names(batcher.next_batch(0.0).members) == ["a", "b"]


def test_a_single_call_longer_than_max_run_s_still_runs() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_run_s=0.025), takes(0, 0.010))
    batcher.push(member("big", rows=100), 0.0)
    assert names(batcher.next_batch(0.0).members) == ["big"]


def test_a_member_too_urgent_for_the_batch_lets_the_patient_behind_it_in() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_run_s=1), takes(0, 0.010))
    batcher.push(member("first", priority=Priority.CRITICAL), 0.0)
    batcher.push(member("too urgent", rows=2, deadline=0.035), 0.0)
    batcher.push(member("patient"), 0.0)
    assert names(batcher.next_batch(0.0).members) == ["first", "patient"]
    assert len(batcher) == 1


def test_only_equal_shapes_share_a_batch_and_nobody_is_lost() -> None:
    batcher: Batcher[str] = Batcher(Limits(), takes(0, 0))
    for name, key in (("a", (3,)), ("b", (5,)), ("c", (3,))):
        batcher.push(member(name, key=key), 0.0)
    assert names(batcher.next_batch(0.0).members) == ["a", "c"]
    assert names(batcher.next_batch(0.0).members) == ["b"]


def test_who_cannot_be_answered_in_time_is_turned_away_at_once() -> None:
    batcher: Batcher[str] = Batcher(Limits(), takes(0.050, 0))
    with pytest.raises(DeadlineExceeded, match=r"about 50\.0 ms, the deadline is in 40\.0 ms"):
        batcher.push(member(deadline=1.040), 1.0)
    assert len(batcher) == 0


def test_the_wait_for_the_run_under_way_counts() -> None:
    batcher: Batcher[str] = Batcher(Limits(), takes(0.050, 0))
    batcher.push(member("running"), 0.0)
    batcher.next_batch(0.0)
    with pytest.raises(DeadlineExceeded):
        batcher.push(member(deadline=0.090), 0.0)
    batcher.push(member("fits", deadline=0.110), 0.0)
    batcher.finished(1, None)
    batcher.push(member("free again", deadline=0.060), 0.0)


def test_the_queue_ahead_counts_and_a_higher_priority_does_not_wait_for_it() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_run_s=0.010), takes(0, 0.010))
    for _ in range(10):
        batcher.push(member(), 0.0)
    with pytest.raises(DeadlineExceeded):
        batcher.push(member(priority=Priority.BACKGROUND, deadline=0.100), 0.0)
    batcher.push(member("critical", priority=Priority.CRITICAL, deadline=0.020), 0.0)
    assert names(batcher.next_batch(0.0).members) == ["critical"]


def test_who_became_hopeless_while_waiting_is_dropped_at_the_batch_boundary() -> None:
    batcher: Batcher[str] = Batcher(Limits(), takes(0.010, 0))
    batcher.push(member("hopeless", deadline=0.050), 0.0)
    batcher.push(member("fine", deadline=0.080), 0.0)
    batch = batcher.next_batch(0.045)
    assert (names(batch.late), names(batch.members)) == (["hopeless"], ["fine"])


def test_a_cancelled_member_leaves_the_queue() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_waiting=2), takes(0, 0))
    gone = member("gone", deadline=3)
    for each in (member("a", deadline=2), gone):
        batcher.push(each, 0.0)
    assert batcher.remove(gone)
    assert not batcher.remove(gone)
    batcher.push(member("b", deadline=4), 0.0)
    assert names(batcher.next_batch(0.0).members) == ["a", "b"]


def test_a_full_queue_refuses_the_last_in_line() -> None:
    batcher: Batcher[str] = Batcher(Limits(max_waiting=2), takes(0, 0))
    batcher.push(member("a"), 0.0)
    batcher.push(member("b"), 0.0)
    with pytest.raises(Refused, match="2 calls wait already"):
        batcher.push(member("c"), 0.0)
    displaced = batcher.push(member("critical", priority=Priority.CRITICAL), 0.0)
    assert displaced is not None
    assert displaced.work == "b"
    assert names(batcher.next_batch(0.0).members) == ["critical", "a"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(Priority)),
            st.one_of(st.just(NEVER), st.floats(0.001, 2.0)),
            st.integers(1, 20),
            st.sampled_from(["wide", "narrow"]),
        ),
        max_size=40,
    )
)
def test_every_member_that_got_in_leaves_exactly_once_and_no_batch_is_late(
    arrivals: list[tuple[Priority, float, int, str]],
) -> None:
    batcher: Batcher[int] = Batcher(Limits(max_rows=24, max_waiting=30, max_run_s=0.05), takes(0.002, 0.001))
    waiting: dict[int, Member[int]] = {}
    for number, (priority, deadline, rows, key) in enumerate(arrivals):
        new = Member(number, rows, priority, deadline, 0.0, key)
        try:
            displaced = batcher.push(new, 0.0)
        except (DeadlineExceeded, Refused):
            continue
        waiting[number] = new
        if displaced is not None:
            del waiting[displaced.work]
    now = 0.0
    while len(batcher):
        batch = batcher.next_batch(now)
        assert batch.members or batch.late
        assert len({each.key for each in batch.members}) <= 1
        assert sum(each.rows for each in batch.members) == batch.rows <= 24
        for each in (*batch.members, *batch.late):
            del waiting[each.work]
        now += batch.predicted_s
        assert all(now <= each.deadline for each in batch.members)
        batcher.finished(batch.rows, batch.predicted_s)
    assert not waiting


def test_the_estimate_learns_a_fixed_cost_and_a_cost_per_row() -> None:
    estimate = Estimate()
    for rows in [1, 32, 4, 16] * 20:
        estimate.observe(rows, 0.002 + 0.001 * rows)
    assert estimate.of(8) == pytest.approx(0.010, rel=0.02)
    assert estimate.fixed_s == pytest.approx(0.002, rel=0.1)


def test_the_estimate_keeps_its_slope_while_all_runs_have_one_size() -> None:
    estimate = Estimate()
    for rows in [1, 32] * 20:
        estimate.observe(rows, 0.002 + 0.001 * rows)
    for _ in range(200):
        estimate.observe(1, 0.003)
    assert estimate.of(32) == pytest.approx(0.034, rel=0.02)


def test_one_stall_moves_the_estimate_little_and_a_lasting_change_moves_it_all_the_way() -> None:
    estimate = Estimate()
    for _ in range(50):
        estimate.observe(1, 0.001)
    estimate.observe(1, 1.0)
    assert estimate.of(1) < 0.0012
    for _ in range(300):
        estimate.observe(1, 0.020)
    assert estimate.of(1) == pytest.approx(0.020, rel=0.01)


def test_a_run_is_placed_by_its_predicted_length_with_hysteresis() -> None:
    placement = Placement()
    lengths_ms = [0.3, 0.7, 0.9, 1.1, 0.9, 0.6, 0.4, 0.9]
    assert [placement.inline(ms / 1000) for ms in lengths_ms] == [True, True, True, False, False, False, True, True]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"max_waiting": -1}, "max_waiting must be at least 1, got -1"),
        ({"max_run_s": float("nan")}, "max_run_s must be above 0 s, got nan"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**limits)  # type: ignore[arg-type]
