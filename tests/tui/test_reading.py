"""Reading curves off: the value at a step, the next step to read, and where reading begins and ends."""

from __future__ import annotations

import math

from finetui.tui.reading import beside, nearest, told, value_at
from finetui.tui.series import Series


def series(values: dict[float, float], capacity: int = 2048) -> Series:
    made = Series(capacity)
    for x, y in values.items():
        made.append(x, y)
    return made


def shown(value: float) -> str:
    return f"{value:.2f}"


def test_the_value_at_a_step_is_the_last_one_before_it() -> None:
    curve = series({10: 1.0, 20: 2.0})
    assert value_at(curve, 9) is None
    assert [getattr(value_at(curve, x), "end", None) for x in (10, 15, 20, 99)] == [1.0, 1.0, 2.0, 2.0]
    assert value_at(Series(), 3) is None


def test_points_that_were_put_together_are_a_range() -> None:
    long = series({float(x): float(x) for x in range(1, 65)}, capacity=16)
    found = value_at(long, 30)
    assert found is not None
    assert found.first <= 30 <= found.last
    assert told(found, shown) == f"{found.low:.2f}–{found.high:.2f}"
    single = value_at(series({1: 0.5}), 1)
    assert single is not None
    assert told(single, shown) == "0.50"


def test_what_was_not_finite_says_so() -> None:
    found = value_at(series({1: 1.0, 2: math.nan}), 2)
    assert found is not None
    assert told(found, shown) == "not finite"


def test_reading_begins_at_the_newest_point_and_ends_past_it() -> None:
    many = [series({float(x): 1.0 for x in range(1, 101)})]
    assert beside(many, None, -5) == 100
    assert beside(many, None, 5) is None
    assert beside(many, 100, -5) == 95
    assert beside(many, 95, 5) == 100
    assert beside(many, 100, 5) is None
    assert beside(many, 98, 50) == 100  # a great step stops at the end once
    assert beside(many, 3, -50) == 1
    assert beside(many, 1, -5) == 1
    assert beside([], None, -5) is None
    assert beside([Series()], 3, 1) is None


def test_every_step_of_a_key_gets_on_where_points_are_rare() -> None:
    rare = [series({100: 1.0, 200: 2.0, 300: 3.0})]
    assert beside(rare, 300, -1) == 200
    assert beside(rare, 200, -1) == 100
    assert beside(rare, 200, 1) == 300


def test_points_of_any_curve_are_read() -> None:
    both = [series({10: 1.0, 30: 1.0}), series({20: 1.0})]
    assert beside(both, 30, -1) == 20
    assert nearest(both, 24) == 20
    assert nearest(both, 26) == 30
    assert nearest([], 3) is None
