"""Numbers, gradients and conditions."""

from __future__ import annotations

import pytest

from finetui.engine.merge.parameters import Condition, at, first_of, is_gradient, numbers


@pytest.mark.parametrize(("place", "value"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0)])
def test_a_gradient_runs_from_end_to_end(place: float, value: float) -> None:
    assert at([0.0, 1.0], "x", place) == pytest.approx(value)
    assert at([0.0, 0.5, 1.0], "x", place) == pytest.approx(value)


def test_a_gradient_of_uneven_steps() -> None:
    assert [at([1.0, 0.7, 0.1], "x", place) for place in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(
        [1.0, 0.85, 0.7, 0.4, 0.1]
    )
    assert at([0.3], "x", 0.6) == 0.3


def test_the_first_condition_that_fits_counts_and_none_leaves_it_to_the_next_setting() -> None:
    setting = [Condition(filter="mlp", value=[0.0, 1.0]), Condition(filter="up_proj", value=5.0)]
    assert at(setting, "layers.0.mlp.up_proj.weight", 0.5) == 0.5
    assert at(setting, "layers.0.q_proj.weight", 0.5) is None
    assert first_of([None, setting, 0.25], "layers.0.q_proj.weight", 0.5) == 0.25
    assert first_of([None], "x", 0.0) is None
    assert numbers(setting) == [0.0, 1.0, 5.0]


def test_what_is_a_gradient() -> None:
    assert is_gradient([0.0, 1.0])
    assert is_gradient([Condition(value=[0.0, 1.0])])
    assert not is_gradient([Condition(filter="mlp", value=0.5), Condition(value=1.0)])
    assert not is_gradient([0.5, 0.5])
    assert not is_gradient(0.5)
