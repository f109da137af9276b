"""A curve in constant memory: nothing that matters is lost by merging."""

from __future__ import annotations

import math

from finetui.tui.series import Series


def test_a_spike_survives_a_long_run() -> None:
    series = Series(capacity=64)
    for step in range(1, 100_001):
        series.append(step, 900.0 if step == 54_321 else 1.0)
    assert len(series.buckets) <= 64
    assert max(bucket.high for bucket in series.buckets) == 900.0
    assert sum(bucket.count for bucket in series.buckets) == 100_000
    assert series.last_x == 100_000


def test_values_that_are_not_finite_are_marked_and_never_drawn() -> None:
    series = Series()
    for step, value in enumerate([1.0, math.nan, math.inf, 2.0], 1):
        series.append(step, value)
    assert [bucket.broken for bucket in series.buckets] == [False, True, True, False]
    assert series.lowest == 1.0
    assert all(math.isfinite(b.high) for b in series.buckets if b.count)


def test_a_resumed_run_goes_over_its_last_steps_again() -> None:
    series = Series()
    for step in range(1, 11):
        series.append(step, float(step))
    series.append(6, 60.0)
    assert [bucket.last for bucket in series.buckets] == [1, 2, 3, 4, 5, 6]
    assert series.latest == 60.0


def test_columns_stand_still_while_the_run_grows() -> None:
    short, long = Series(), Series()
    for step in range(1, 400):
        long.append(step, step / 7)
        if step < 200:
            short.append(step, step / 7)
    ends = [[column and column.high for column in series.columns(0, 1000, 100)] for series in (short, long)]
    assert ends[0][:19] == ends[1][:19]
    assert ends[0][25:] == [None] * 75


def test_no_points_and_no_room() -> None:
    assert Series().columns(0, 10, 5) == [None] * 5
    assert Series().columns(0, 0, 5) == [None] * 5
    assert math.isnan(Series().lowest)
