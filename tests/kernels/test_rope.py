"""Rotary embedding against float64: layouts, partial rotation, head counts, strides, expanded gradients."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import rope
from finetui.kernels.selfcheck import compare

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tables(device, dtype, batch, tokens, rotary):
    """Random ones: with true angles both halves of a table are equal, and a swap of them would pass."""
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(batch, tokens, rotary, generator=generator).to(device, dtype) for _ in range(2))


def verdict(q, k, cos, sin, layout, **options):
    def ours(q, k):
        return rope.rope(q, k, cos, sin, layout, **options)

    def stock(q, k):
        return rope.rope_reference(q, k, cos.to(q.dtype), sin.to(q.dtype), layout, **options)

    return compare(ours, stock, stock, (q, k))


@pytest.mark.parametrize("layout", rope.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "k_heads", "rotary"), [((2, 3, 5, 8), 1, 8), ((1, 4, 3, 10), 2, 6), ((2, 1, 1, 2), 1, 2)], ids=str
)
def test_output_and_gradients_are_as_close_to_float64_as_stock(device, layout, dtype, shape, k_heads, rotary):
    torch.manual_seed(0)
    q = torch.randn(shape, device=device).to(dtype)
    k = torch.randn(shape[0], k_heads, *shape[2:], device=device).to(dtype)
    for batch in {1, shape[0]}:
        result = verdict(q, k, *tables(device, dtype, batch, shape[2], rotary), layout)
        assert result.ok, result.why


def test_heads_behind_tokens(device):
    q, k = torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 5, 2, 8, device=device)
    result = verdict(q, k, *tables(device, q.dtype, 2, 5, 8), "half", head_axis=2)
    assert result.ok, result.why


def test_backward_undoes_a_rotation(device):
    q, k = torch.randn(2, 3, 7, 8, device=device), torch.randn(2, 1, 7, 8, device=device)
    angles = torch.randn(1, 7, 4, device=device).repeat(1, 1, 2)
    q.requires_grad_()
    rotated, _ = rope.rope(q, k, angles.cos(), angles.sin())
    (back,) = torch.autograd.grad(rotated, q, rotated.detach())
    torch.testing.assert_close(back, q.detach(), rtol=1e-5, atol=1e-5)


def test_views_of_one_projection_and_expanded_gradients(device):
    merged = torch.randn(2, 5, 6 * 8, device=device, requires_grad=True)
    cos, sin = tables(device, merged.dtype, 1, 5, 8)

    def total(apply):
        q, k, _ = merged.view(2, 5, 6, 8).split((3, 2, 1), dim=2)
        q, k = apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return torch.autograd.grad(q.sum() + 2 * k.sum(), merged)

    torch.testing.assert_close(total(rope.rope), total(rope.rope_reference), rtol=1e-5, atol=1e-5)


def test_an_unused_key_still_gives_the_query_its_gradient(device):
    q, k = (torch.randn(1, 2, 3, 4, device=device, requires_grad=True) for _ in range(2))
    rope.rope(q, k, *tables(device, q.dtype, 1, 3, 4))[0].sum().backward()
    assert q.grad.any()
    assert not k.grad.any()


def test_inputs_stay_as_they_are_and_memory_order_is_kept(device):
    q = torch.randn(1, 5, 2, 4, device=device).transpose(1, 2)
    k, before = torch.randn(1, 2, 5, 4, device=device), q.clone()
    out, _ = rope.rope(q, k, *tables(device, q.dtype, 1, 5, 4))
    assert torch.equal(q, before)
    assert out.stride() == q.stride()
    assert rope.rope(q[:, :, :0], k[:, :, :0], *tables(device, q.dtype, 1, 0, 4))[0].shape == (1, 2, 0, 4)


@pytest.mark.parametrize(
    ("table", "message"),
    [((1, 5, 5), "rotary places"), ((1, 5, 6), "rotary places"), ((3, 5, 4), "fit"), ((1, 4, 4), "fit")],
)
def test_tables_that_do_not_fit_are_refused(device, table, message):
    q = torch.randn(2, 2, 5, 4, device=device)
    with pytest.raises(ValueError, match=message):
        rope.rope(q, q, torch.zeros(table, device=device), torch.zeros(table, device=device))


def test_trained_tables_are_refused(device):
    q = torch.randn(1, 2, 5, 4, device=device)
    cos = torch.zeros(1, 5, 4, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient"):
        rope.rope(q, q, cos, cos)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", rope.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "rotary"), [((32, 8), 128, 128), ((64, 4), 64, 32), ((28, 4), 256, 256)])
def test_real_shapes(layout, dtype, heads, dim, rotary):
    q, k = (torch.randn(2, 1000, n, dim, device="cuda", dtype=dtype).transpose(1, 2) for n in heads)
    result = verdict(q, k, *tables(torch.device("cuda"), dtype, 2, 1000, rotary), layout)
    assert result.ok, result.why
