"""How a sublayer joins the hidden states: x + m·norm(o) against float64, in every form and dtype, in place too."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import residual, rms_norm
from finetui.kernels.residual import Join, Norm
from finetui.kernels.selfcheck import compare


class _Joined(torch.autograd.Function):
    """The pieces as a function of autograd's, for the judge."""

    @staticmethod
    def forward(ctx, x, o, weight, eps, form, scale):
        ctx.how = Join(Norm(weight, eps, form, trained=True), scale)
        s, _, rstd = residual.join_again(x, o, ctx.how)
        ctx.save_for_backward(o, rstd)
        return s

    @staticmethod
    def backward(ctx, ds):
        o, rstd = ctx.saved_tensors
        do, dweight = residual.join_gradient(ds, o, rstd, ctx.how, o.dtype)
        return ds, do, dweight, None, None, None


@pytest.mark.parametrize("form", rms_norm.FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "scale"), [((1, 2), 1.0), ((5, 33), 0.3), ((70, 64), 1.0)], ids=str)
def test_sum_and_gradients_are_as_close_to_float64_as_stock(device, form, dtype, shape, scale):
    torch.manual_seed(0)
    x, o, weight = (torch.randn(size, device=device).to(dtype) for size in (shape, shape, shape[1:]))

    def stock(x, o, w):
        return x + scale * rms_norm.rms_norm_reference(o, w, 1e-6, form)

    verdict = compare(lambda x, o, w: _Joined.apply(x, o, w, 1e-6, form, scale), stock, stock, (x, o, weight))
    assert verdict.ok, verdict.why


def test_wide_hidden_states_and_a_sum_in_their_own_place(device):
    torch.manual_seed(0)
    x, o = torch.randn(7, 40, device=device), torch.randn(7, 40, device=device).bfloat16()
    how = Join(Norm(torch.randn(40, device=device), 1e-6, "one-plus"))
    expected = x + rms_norm.rms_norm_reference(o.float(), how.norm.weight, 1e-6, "one-plus")
    assert torch.allclose(residual.join_again(x, o, how).s, expected, atol=1e-5)
    mine = x.clone()
    assert residual.join_again(mine, o, how, out=mine).s is mine
    assert torch.allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_factor_alone(device, dtype):
    ds = torch.randn(3, 4, device=device, dtype=dtype)
    do, dnorm = residual.join_gradient(ds, None, None, Join(scale=0.25), torch.bfloat16)
    assert torch.equal(do, (ds.float() * 0.25).bfloat16())
    assert dnorm is None
    assert residual.join_gradient(ds, None, None, Join(), dtype)[0] is ds
