"""Events into states: what they change in the tiles and recent events of the entities they concern.

All entities of a batch are changed together: the work that numpy is given grows with the batch and with what the states
hold, the work of Python hardly at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.feature.tiles.batch import Batch, Bools, Floats, Groups
from services.feature.tiles.places import NONE, indices_of, owner_places, owners_of, places, starts_of, tile_places
from services.feature.tiles.plan import Moments, Plan, Recent, Run
from services.feature.tiles.sketched import sketched
from services.feature.tiles.state import NEWEST, OLDEST, Opened, Words

AHEAD_US = 300_000_000
"""How far a producer's clock may be ahead of a reader's: as far as events are taken from the future."""


def merge(plan: Plan, opened: Opened, batch: Batch) -> Opened:
    """The states with the batch counted. Positions are the caller's business."""
    heads = opened.heads.copy()
    np.maximum.at(heads[:, NEWEST], batch.entity, batch.known_us)
    np.minimum.at(heads[:, OLDEST], batch.entity, batch.known_us)
    merged = Opened(heads, opened.counts.copy(), opened.tiles, opened.recents, opened.words)
    if plan.runs:
        _count_in_tiles(plan, opened, batch, merged)
    merged.recents = _latest(plan, opened, batch, merged.counts)
    return merged


def _count_in_tiles(plan: Plan, opened: Opened, batch: Batch, merged: Opened) -> None:
    """Sets the tiles, the words and their counts."""
    runs = len(plan.runs)
    oldest = _oldest_places(plan, merged.heads[:, NEWEST])
    groups = [_groups(plan, run, batch, oldest) for run in plan.runs if run.source == batch.source]
    merged.tiles, at = _with_tiles(plan, opened, oldest, groups)
    for group in groups:
        _count(group, batch, merged.tiles, at)
    merged.counts[:, :runs] = np.bincount(owners_of(at), minlength=runs * len(merged.heads)).reshape(-1, runs)
    if plan.sketches:
        merged.words = sketched(plan, opened, oldest, groups, batch, merged, at)


def _oldest_places(plan: Plan, newest_us: Words) -> Words:
    """The place of the oldest tile that is kept, of each entity and run: some before those that windows reach now.

    So a reader whose clock is up to a step, or AHEAD_US, behind the newest event still finds all of its window.
    """
    steps_us = np.array([run.step_us for run in plan.runs], dtype=np.int64)
    steps = np.array([run.steps + -(-AHEAD_US // run.step_us) for run in plan.runs], dtype=np.int64)
    indices = newest_us[:, np.newaxis] // steps_us - steps
    return (owner_places(indices.size).reshape(indices.shape) + indices).ravel()


def _groups(plan: Plan, run: Run, batch: Batch, oldest: Words) -> Groups:
    owners = batch.entity * len(plan.runs) + run.number
    at = places(owners, batch.known_us // run.step_us)
    late = at < oldest[owners]
    events = np.flatnonzero(~late)
    at = at[events] if late.any() else at
    starts = starts_of(at)
    return Groups(run, events, starts, np.diff(starts, append=len(at)), at[starts])


def _with_tiles(plan: Plan, opened: Opened, oldest: Words, groups: Sequence[Groups]) -> tuple[Words, Words]:
    """The tiles that stay, with those that the groups need, and their places."""
    tiles, at = opened.tiles[:-1], tile_places(opened, len(plan.runs))
    stays = at >= oldest[owners_of(at)]
    if not stays.all():
        tiles, at = tiles[stays], at[stays]
    wanted = np.sort(np.concatenate([NONE, *(group.places for group in groups)]))
    where = at.searchsorted(wanted)
    missing = np.ones(len(wanted), dtype=np.bool_)
    found = where < len(at)
    missing[found] = at[where[found]] != wanted[found]
    new = wanted[missing]
    rows = np.tile(plan.new_tile(), (len(new), 1))
    rows[:, 0] = indices_of(new)
    return np.insert(tiles, where[missing], rows, axis=0), np.insert(at, where[missing], new)


def _count(group: Groups, batch: Batch, tiles: Words, at: Words) -> None:
    """Adds the group's events to their tiles, in place. tiles: contiguous."""
    if not len(group.starts):
        return
    run, width = group.run, tiles.shape[1]
    bits, numbers = tiles.reshape(-1), tiles.reshape(-1).view(np.float64)
    rows = at.searchsorted(group.places) * width
    if run.events >= 0:
        numbers[rows + run.events] += group.lengths
    for moments in run.moments:
        _add_moments(group, moments, batch, numbers, rows)
    for columns, sign in ((run.minima, 1.0), (run.maxima, -1.0)):
        for value, column in columns.items():
            values, part = batch.taking_part(value, group.events)
            least = np.minimum.reduceat(np.where(part, sign * values, np.inf), group.starts)
            numbers[rows + column] = np.minimum(numbers[rows + column], least)
    if run.first >= 0:
        _keep_first(group, batch, bits, rows)


def _add_moments(group: Groups, moments: Moments, batch: Batch, numbers: Floats, rows: Words) -> None:
    values, part = batch.taking_part(moments.value, group.events)
    taken = np.add.reduceat(part, group.starts, dtype=np.float64)
    if moments.spread >= 0:
        _add_spread(group, moments, numbers, rows, values, part, taken)
    if moments.count >= 0:
        numbers[rows + moments.count] += taken
    if moments.total >= 0:
        # one after the other: events that arrive in order add up to the same bits, however they were batched
        np.add.at(numbers, (rows + moments.total).repeat(group.lengths), values)


def _add_spread(
    group: Groups, moments: Moments, numbers: Floats, rows: Words, values: Floats, part: Bools, taken: Floats
) -> None:
    """Chan's merge of two sums of squares, each around its own mean."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.add.reduceat(values, group.starts) / np.maximum(taken, 1)
        away = np.where(part, values - mean.repeat(group.lengths), 0.0)
        spread = np.add.reduceat(away * away, group.starts)
        before = numbers[rows + moments.count]
        between = mean - numbers[rows + moments.total] / np.maximum(before, 1)
        both = (before > 0) & (taken > 0)
        spread[both] += (between * between * (before * taken / np.maximum(before + taken, 1)))[both]
        numbers[rows + moments.spread] += spread


def _keep_first(group: Groups, batch: Batch, bits: Words, rows: Words) -> None:
    first = group.events[group.starts]
    known_us, sequence = rows + group.run.first, rows + group.run.first + 1
    earlier = batch.known_us[first] < bits[known_us]
    earlier |= (batch.known_us[first] == bits[known_us]) & (batch.sequence[first] < bits[sequence])
    first, rows = first[earlier], rows[earlier]
    bits[known_us[earlier]] = batch.known_us[first]
    bits[sequence[earlier]] = batch.sequence[first]
    for value, column in group.run.firsts.items():
        bits[rows + column] = batch.bits(value, first)


def _latest(plan: Plan, opened: Opened, batch: Batch, counts: Words) -> Words:
    """The latest events of every entity and source; sets their counts."""
    recent = next((recent for recent in plan.recents if recent.source == batch.source), None)
    if recent is None:
        return opened.recents
    runs, kinds = len(plan.runs), len(plan.recents)
    old = counts[:, runs : runs + kinds]
    owners = np.arange(old.size).repeat(old.ravel())
    rows, entity = _last_rows(plan, recent, batch)
    rows, owners = np.concatenate((opened.recents, rows)), np.concatenate((owners, entity * kinds + recent.number))
    order = np.lexsort((rows[:, 1], rows[:, 0], owners))
    owners = owners[order]
    total = np.bincount(owners, minlength=old.size)
    most = np.tile([recent.most for recent in plan.recents], len(old))
    kept = _last(owners, total, most)
    counts[:, runs : runs + kinds] = np.minimum(total, most).reshape(old.shape)
    return rows[order[kept]]


def _last(owners: Words, total: Words, most: Words) -> Words:
    """Which rows are among the last `most` of their owner."""
    from_end = total.cumsum()[owners] - np.arange(len(owners))
    return np.flatnonzero(from_end <= most[owners])


def _last_rows(plan: Plan, recent: Recent, batch: Batch) -> tuple[Words, Words]:
    total = np.bincount(batch.entity)
    last = _last(batch.entity, total, np.full(len(total), recent.most))
    rows = np.full((len(last), plan.recent_words), 0, dtype=np.int64)
    rows[:, 0], rows[:, 1] = batch.known_us[last], batch.sequence[last]
    for value, column in recent.columns.items():
        rows[:, column] = batch.bits(value, last)
    return rows, batch.entity[last]
