"""Masks of exactly so many numbers, by magnitude, by chance or between two bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetui.engine.merge import pruning


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), st.data())
def test_the_largest_are_those_of_a_sort(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    tensor = torch.tensor(values)
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    mask = pruning.largest(tensor, count)
    assert mask.nonzero().flatten().tolist() == sorted(order[:count])


def test_the_largest_of_several_chunks_and_of_equal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "CHUNK", 7)
    values = torch.tensor([1.0, -2.0, 2.0, 0.0] * 9).reshape(6, 6)
    for count in range(37):
        mask = pruning.largest(values, count)
        assert int(mask.sum()) == count
        order = sorted(range(36), key=lambda i: (-abs(float(values.flatten()[i])), i))
        assert mask.flatten().nonzero().flatten().tolist() == sorted(order[:count])


def test_a_count_that_is_none() -> None:
    with pytest.raises(ValueError):
        pruning.largest(torch.ones(3), 4)


def test_trim_keeps_at_least_one() -> None:
    assert pruning.trim(torch.tensor([1.0, -3.0, 2.0]), 0.1).tolist() == [0.0, -3.0, 0.0]


def test_middle_drops_both_ends() -> None:
    delta = torch.tensor([float(n) for n in range(1, 11)])
    assert pruning.middle(delta.clone(), 0.6, 0.2).tolist() == [0, 0, 3, 4, 5, 6, 7, 8, 0, 0]
    assert pruning.middle(delta.clone(), 0.9, 0.5).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]  # density comes first


def test_large_numbers_are_kept_more_often() -> None:
    row = torch.arange(1.0, 101.0).repeat(2000, 1)
    kept = pruning.magnitude_drop(row.clone(), 0.5, 0.3, torch.Generator().manual_seed(0))
    share = (kept != 0).float().mean(0)
    assert float(share[0]) == pytest.approx(0.2, abs=0.04)
    assert float(share[-1]) == pytest.approx(0.8, abs=0.04)
    torch.testing.assert_close(kept.mean(0), row[0], rtol=0.2, atol=0.0)  # the mean stays
    last = kept[:, -1][kept[:, -1] != 0]
    assert float(last[0]) == pytest.approx(100 / 0.8)


def test_draws_do_not_depend_on_the_size_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = torch.ones(40, 16)
    whole = pruning.drop(delta.clone(), 0.5, torch.Generator().manual_seed(3))
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    monkeypatch.setattr(pruning, "CHUNK", 64)
    assert torch.equal(whole, pruning.drop(delta.clone(), 0.5, torch.Generator().manual_seed(3)))
    assert torch.equal(
        pruning.drop(delta.clone(), 0.5, torch.Generator().manual_seed(3), rescale=False), whole.clamp(max=1.0)
    )
