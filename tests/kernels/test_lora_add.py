"""What an adapter, a bias and a residual add to a product: the sum itself, and what it is not to look at."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import faster, lora_add, projection, selfcheck


def given(device, rows=5, columns=37, rank=3):
    torch.manual_seed(0)
    y, add, xa, b = (
        torch.randn(*shape, device=device) for shape in ((rows, columns),) * 2 + ((rows, rank), (columns, rank))
    )
    return y, add, torch.randn(columns, device=device), xa, b


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rank", [3, lora_add.MAX_RANK + 1])
def test_it_is_the_sum(device, keep, biased, rank):
    y, add, bias, xa, b = given(device, rank=rank)
    expected = add + 0.7 * xa @ b.t() + (bias if biased else 0) + (y if keep else 0)
    lora_add.add_to(y, add, bias if biased else None, xa, b, 0.7, keep=keep)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("tile", [(16, 32, 1), (64, 32, 2), (128, 32, 4), (128, 32, 8), (32, 64, 4)])
def test_every_value_is_where_it_belongs_in_tiles_of_any_shape(device, monkeypatch, tile):
    """The product's rows and columns come in the order of a matrix unit, and must all find their places."""
    monkeypatch.setattr(lora_add, "_READ", tile)
    y, add, _, xa, b = given(device, rows=130, columns=70)
    expected = y + add + 0.7 * xa @ b.t()
    lora_add.add_to(y, add, None, xa, b, 0.7)
    torch.testing.assert_close(y, expected)


def test_what_was_there_is_not_looked_at(device):
    y, add, _, xa, b = given(device)
    y.fill_(float("nan"))
    lora_add.add_to(y, add, None, xa, b, 1.0, keep=False)
    torch.testing.assert_close(y, add + xa @ b.t())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("place", ["new", "given", "the residual", "its memory"])
def test_a_projection_adds_the_same_either_way(device, monkeypatch, biased, place):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((6, 8), (10, 8), (10,)))
    xa, b, add = (torch.randn(*shape, device=device) for shape in ((6, 4), (10, 4), (6, 10)))
    part = projection.Projection(weight, bias if biased else None, 4, 0.5)
    expected = add + x @ weight.t() + 0.5 * xa @ b.t() + (bias if biased else 0)
    calls, stock = [], lora_add.add_to
    monkeypatch.setattr(lora_add, "add_to", lambda *a, **k: calls.append(1) or stock(*a, **k))
    for first in (True, False):
        monkeypatch.setattr(faster, "sum_first", lambda *_, ok=first: selfcheck.Verdict(ok, "slower"))
        mine = add.clone()
        empty = torch.full_like(add, float("nan"))
        out = {"new": None, "given": empty, "the residual": mine, "its memory": mine[:]}[place]
        got = projection.expand(x, xa, weight, b, part, add=mine, out=out)
        torch.testing.assert_close(got, expected)
        assert out is None or got.data_ptr() == out.data_ptr()
        if place in ("new", "given"):
            assert torch.equal(mine, add)
    assert len(calls) == (place != "the residual")  # where they are one, there is nothing to copy
