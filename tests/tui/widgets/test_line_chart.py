"""Curves: round axes, gaps for what is not finite, nothing drawn outside, no size that breaks it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetui.tui.axes import Scale, axis_end, latest_part, tick, ticks
from finetui.tui.history import Mark
from finetui.tui.series import Series
from finetui.tui.widgets.line_chart import Curve, LineChart, mark_line, plot, scale_for
from finetui.tui.widgets.lines import length


def series(values: list[float]) -> Series:
    made = Series()
    for step, value in enumerate(values, 1):
        made.append(step, value)
    return made


def picture(values: list[float], width: int = 20, height: int = 5, end: float = 20.0) -> list[str]:
    curves = [Curve(series(values))]
    scale = scale_for(curves)
    finite = [value for value in values if math.isfinite(value)]
    assert scale, "no axis for finite values"
    assert scale.low <= min(finite) <= max(finite) <= scale.high
    return ["".join(text for text, _ in line) for line in plot(curves, width, height, scale, end)]


def test_a_falling_line_starts_at_the_top_and_ends_at_the_bottom() -> None:
    lines = picture([float(20 - n) for n in range(20)])
    first, last = (next(y for y, line in enumerate(lines) if line[x] != " ") for x in (1, 19))
    assert (first, last) == (0, 4)


def test_a_value_that_is_not_finite_is_a_gap_with_a_mark_on_the_baseline() -> None:
    lines = picture([1.0, 1.0, 2.0, math.nan, math.inf, 1.0, 1.0])
    assert lines[-1][4:6] == "××"  # steps 4 and 5 of 20, on 20 cells of two columns each
    assert "×" not in "".join(picture([1.0, 2.0, 3.0]))


def test_what_happened_stands_below_its_step() -> None:
    marks = {"checkpoint": [Mark(10, "checkpoint")], "warning": [Mark(20, "warning")], "nan": [Mark(20, "nan")]}
    (line,) = ["".join(text for text, _ in mark_line(marks, 21, 20.0))]
    assert (line[10], line[20]) == ("◆", "×")  # the graver one is seen
    assert mark_line({"warning": [Mark(99, "warning")]}, 20, 20.0) == []


def test_checkpoints_at_every_turn_say_nothing() -> None:
    many = {"checkpoint": [Mark(step, "checkpoint") for step in range(100)], "warning": [Mark(50, "warning")]}
    assert "".join(text for text, _ in mark_line(many, 20, 100.0)).strip() == "!"


def test_a_spike_between_two_columns_is_seen() -> None:
    values = [1.0] * 2000
    values[777] = 50.0
    assert picture(values, end=2000.0)[0].strip()


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60),
    width=st.integers(1, 40),
    height=st.integers(1, 12),
    log=st.booleans(),
)
def test_any_values_at_any_size(values: list[float], width: int, height: int, log: bool) -> None:
    curves = [Curve(series(values)), Curve(series(values[::2]), points=True)]
    scale = scale_for(curves, log=log)
    if scale is None:
        assert not any(math.isfinite(value) for value in values)
        return
    lines = plot(curves, width, height, scale, axis_end(len(values), 0))
    assert len(lines) == height
    assert all(length(line) == width for line in lines)
    assert all(0 <= row < height for row in ticks(scale, height))


def test_the_axis_stands_still_while_the_run_grows() -> None:
    ends = [axis_end(step, 1000) for step in range(1, 1001)]
    assert len(set(ends)) < 8
    assert ends[-1] == 1000
    assert all(end >= step for step, end in enumerate(ends, 1))
    assert axis_end(0, 0) > 0
    assert axis_end(5000, 1000) >= 5000


def test_round_labels() -> None:
    scale = scale_for([Curve(series([1.03, 2.46]))])
    assert scale == Scale(1.0, 2.6)
    assert [tick(value) for value in ticks(scale, 13).values()] == ["1", "2.6", "1.5", "2"]
    assert scale_for([Curve(series([0.0, 1.0]))], log=True) == Scale(0.0, 1.0)
    assert scale_for([Curve(series([0.02, 3.0]))], log=True) == Scale(0.02, 3.0, log=True)
    assert [tick(value) for value in (0.0, 1e-6, 0.5, 12_345.0, 2e9)] == ["0", "1e-6", "0.5", "12,345", "2e9"]


@pytest.mark.parametrize("size", [(0, 0), (1, 1), (3, 2), (4, 3), (10, 1), (200, 60)])
def test_a_chart_of_any_size(size: tuple[int, int]) -> None:
    chart = LineChart("loss")
    assert isinstance(chart.draw(*size), list)
    chart._curves, chart._total = [Curve(series([3.0, math.nan, 1.0]))], 100.0
    assert all(length(line) <= size[0] for line in chart.draw(*size))


def spiky(**at: float) -> list[float]:
    """A curve that falls from 2.4 to 1.2, with other values at some steps."""
    values = [1.2 + 1.2 * math.exp(-step / 60) for step in range(400)]
    for step, value in at.items():
        values[int(step.removeprefix("at"))] = value
    return values


def test_a_spike_leaves_the_axis_where_it_would_flatten_the_rest() -> None:
    chart = LineChart("loss")
    chart.spikes = False
    chart.show([Curve(series(spiky(at200=50.0)))], [], 400.0)
    lines = ["".join(text for text, _ in line) for line in chart.draw(60, 12)]
    assert lines[0].count("▲") == 1
    assert lines[0].strip().startswith("2.4")
    assert "▲ to 50" in "".join(text for text, _ in chart.title(60))
    mean, average = [], 2.4
    for value in spiky(at200=50.0):
        average += 0.1 * (value - average)
        mean.append(average)
    chart.show([Curve(series(spiky(at200=50.0))), Curve(series(mean), derived=True)], [], 400.0)
    after = ["".join(text for text, _ in line) for line in chart.draw(60, 12)]
    assert after[0].count("▲") == 1  # what the spike does to the mean changes neither the axis nor the mark
    assert after[0].strip().startswith("2.4")
    chart.log_scale = True  # where there is room for all
    assert "▲" not in "".join(text for line in chart.draw(60, 12) for text, _ in line)
    chart.log_scale, chart.spikes = False, True
    assert "".join(text for text, _ in chart.draw(60, 12)[0]).strip().startswith("50")


@pytest.mark.parametrize(
    ("values", "top"),
    [
        (spiky(), 2.4),
        ([30.0, 20.0, *spiky()], 30.0),  # a start from high up is no spike
        ([*spiky(), 30.0, 40.0], 40.0),  # nor is a curve that ends high up
        (spiky(**{f"at{step}": 40.0 for step in range(100, 400, 10)}), 40.0),  # nor what happens all the time
        (spiky(at200=3.0), 3.0),  # nor what hardly stands out
        ([1.0] * 20 + [50.0] + [1.0] * 10, 50.0),  # too few to say what is usual
    ],
)
def test_what_is_no_spike_stays_on_the_axis(values: list[float], top: float) -> None:
    curves = [Curve(series(values))]
    scale = scale_for(curves, spikes=False)
    assert scale == scale_for(curves)
    assert math.isnan(scale.beyond)
    assert scale.high >= top * (1 - 1e-9)


@pytest.mark.parametrize(
    ("last", "window"),
    [(10, (0, 100)), (100, (0, 100)), (101, (25, 125)), (125, (25, 125)), (126, (50, 150)), (400, (300, 400))],
)
def test_the_newest_part_moves_by_quarters_of_itself(last: float, window: tuple[float, float]) -> None:
    assert latest_part(last, 400.0, 4.0) == window


def test_of_a_chart_only_its_newest_part() -> None:
    chart = LineChart("loss")
    values = [9.0] * 298 + [1.0, 2.0] * 51
    marks = {"checkpoint": [Mark(100, "checkpoint"), Mark(350, "checkpoint")]}
    pictures = []
    for parts in (1.0, 4.0):
        chart.parts = parts
        chart.show([Curve(series(values))], [], 400.0, marks)
        pictures.append(["".join(text for text, _ in line) for line in chart.draw(67, 12)])
    whole, newest = pictures
    assert [picture[0].strip()[:2] for picture in pictures] == ["9┤", "2┤"]  # the axis holds what is shown
    assert [line[-2].count("◆") for line in pictures] == [2, 1]
    assert (whole[-1].split()[0], newest[-1].split()[0]) == ("0", "300")
    assert whole[-1].endswith("step 400")
    assert newest[-1].endswith("step 400")


def test_a_mean_is_drawn_only_as_far_as_it_lies_on_the_axis() -> None:
    low, high = series([1.0, 1.1, 1.0, 1.1, 1.0, 1.1, 1.0, 1.1]), series([9.0, 6.0, 3.0, 1.5, 1.05, 1.05, 1.05, 1.05])
    curves = [Curve(low, "trace"), Curve(high, "accent", derived=True)]
    scale = scale_for(curves, spikes=False)
    assert scale is not None
    assert scale.high < 1.5
    roles = [{role for text, role in line if text.strip()} for line in plot(curves, 16, 4, scale, 8.0)]
    first = plot([curves[1]], 16, 4, scale, 8.0)
    assert any("accent" in line for line in roles)
    assert not any(text.strip() for text, _ in first[0])  # no line along the upper edge


def test_a_line_stands_where_values_are_read_off() -> None:
    curves = [Curve(series([1.0] * 20))]
    scale = scale_for(curves)
    assert scale is not None
    lines = ["".join(text for text, _ in line) for line in plot(curves, 20, 5, scale, 20.0, at=10.0)]
    assert [line[10] for line in lines].count("│") == 4  # and the curve before it
    assert not any("│" in "".join(t for t, _ in line) for line in plot(curves, 20, 5, scale, 20.0, at=99.0))
