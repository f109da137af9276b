"""Intervals that cover what they say, and verdicts only where they are due."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("numpy")
import numpy as np

from finetui.engine.evaluation.statistics import PerRow, difference, wilson


def test_wilson_is_the_published_one() -> None:
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert all(math.isnan(edge) for edge in wilson(0, 0))


def test_a_figure_is_a_ratio_of_sums() -> None:
    figure = PerRow((10.0, 0.0, 5.0), (2.0, 0.0, 1.0), lower_is_better=True)
    assert (figure.value, figure.rows, figure.binary) == (5.0, 2, False)
    assert figure.interval() == (5.0, 5.0)
    shares = PerRow.of([1.0, 0.0, None, 1.0])
    assert (shares.value, shares.rows, shares.binary) == (pytest.approx(2 / 3), 3, True)
    assert shares.interval() == wilson(2, 3)
    assert math.isnan(PerRow.of([None]).value)
    assert math.isnan(PerRow((0.4,), (1.0,)).interval()[0])  # one row says nothing about others


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        tokens = draw.integers(5, 50, 60)
        low, high = PerRow(tuple(tokens * draw.normal(2.0, 0.5, 60)), tuple(map(float, tokens))).interval()
        covered += low < 2.0 < high
    assert 180 <= covered <= 198  # 95% but for few rows and 200 trials


def test_pairing_sees_what_the_rows_hide() -> None:
    draw = np.random.default_rng(6)
    hard = draw.normal(3.0, 1.0, 50)  # how hard rows are differs more than the models do
    tuned, base = (PerRow(tuple(hard + shift + draw.normal(0, 0.05, 50)), (1.0,) * 50, True) for shift in (-0.1, 0.0))
    found = difference(tuned, base)
    assert found.verdict == "better"
    assert found.low < -0.1 < found.high < 0
    assert tuned.interval()[1] > base.interval()[0]  # by themselves they overlap
    assert difference(base, tuned).verdict == "worse"
    assert difference(tuned, tuned).verdict == "no difference"
    assert difference(tuned, base) == found  # the same every time


def test_shares_are_better_upwards_and_few_rows_say_nothing() -> None:
    good, bad = PerRow.of([1.0] * 20), PerRow.of([0.0] * 10 + [1.0] * 10)
    assert difference(good, bad).verdict == "better"
    assert difference(bad, good).verdict == "worse"
    few = difference(PerRow.of([1.0] * 9), PerRow.of([0.0] * 9))
    assert (few.verdict, few.value, few.rows) == ("too few rows", 1.0, 9)
    unscored = difference(PerRow.of([1.0, None] * 10), PerRow.of([None, 1.0] * 10))
    assert (unscored.verdict, unscored.rows) == ("too few rows", 0)
    with pytest.raises(ValueError, match="can't be paired"):
        difference(good, PerRow.of([1.0]))


def test_noise_is_seldom_called_a_difference() -> None:
    draw = np.random.default_rng(7)
    called = 0
    for _ in range(200):
        one, other = (PerRow(tuple(draw.normal(1.0, 0.3, 40)), (1.0,) * 40) for _ in range(2))
        called += difference(one, other).verdict != "no difference"
    assert called <= 20
