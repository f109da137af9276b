"""RMSNorm against float64, in every form and dtype, with awkward shapes, strides and gradients."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import rms_norm
from finetui.kernels.launch import row_tile
from finetui.kernels.selfcheck import compare

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def ours(form):
    return lambda x, w: rms_norm.rms_norm(x, w, EPS, form)


def stock(form):
    return lambda x, w: rms_norm.rms_norm_reference(x, w, EPS, form)


@pytest.mark.parametrize("form", rms_norm.FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 33), (70, 64), (2, 2049)], ids=str)
def test_output_and_gradients_are_as_close_to_float64_as_stock(device, form, dtype, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    x[0] *= 100  # an outlier row, as the first token of a sequence is
    verdict = compare(ours(form), stock(form), stock(form), (x.to(dtype), weight.to(dtype)))
    assert verdict.ok, verdict.why


@pytest.mark.parametrize("form", rms_norm.FORMS)
def test_fp32_weight_on_half_input_promotes_as_stock(device, form):
    x, weight = torch.randn(3, 40, device=device).half(), torch.randn(40, device=device)
    verdict = compare(ours(form), stock(form), stock(form), (x, weight))
    assert verdict.ok, verdict.why


@pytest.mark.parametrize("form", rms_norm.FORMS)
def test_residual_form_equals_addition_then_norm(device, form):
    x, residual, weight = (torch.randn(s, device=device).half() for s in ((7, 50), (7, 50), (50,)))

    def stock_pair(x, residual, w):
        total = x + residual
        return rms_norm.rms_norm_reference(total, w, EPS, form), total

    verdict = compare(
        lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS, form), stock_pair, stock_pair, (x, residual, weight)
    )
    assert verdict.ok, verdict.why


@pytest.mark.parametrize("used", [0, 1])
def test_residual_form_when_one_output_is_unused(device, used):
    x, residual = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    weight = torch.rand(8, device=device)
    got = torch.autograd.grad(rms_norm.add_rms_norm(x, residual, weight, EPS)[used].square().sum(), (x, residual))
    total = x + residual
    stock_outputs = (rms_norm.rms_norm_reference(total, weight, EPS), total)
    expected = torch.autograd.grad(stock_outputs[used].square().sum(), (x, residual))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_strided_input_and_expanded_gradient(device):
    wide = torch.randn(6, 3, 100, device=device)
    x = wide[:, 1, 10:74].requires_grad_()  # rows 300 apart
    weight = torch.rand(64, device=device, requires_grad=True)
    got = torch.autograd.grad(rms_norm.rms_norm(x, weight, EPS).sum(), (x, weight))  # gradient of stride 0
    expected = torch.autograd.grad(rms_norm.rms_norm_reference(x, weight, EPS).sum(), (x, weight))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    transposed = torch.randn(64, 5, device=device).t()
    torch.testing.assert_close(
        rms_norm.rms_norm(transposed, weight, EPS), rms_norm.rms_norm_reference(transposed, weight, EPS)
    )


def test_frozen_weight_gets_no_gradient_and_changes_nothing_for_x(device):
    x, weight = torch.randn(9, 20, device=device, requires_grad=True), torch.rand(20, device=device)
    (frozen,) = torch.autograd.grad(rms_norm.rms_norm(x, weight, EPS).cos().sum(), x)
    trained, _ = torch.autograd.grad(rms_norm.rms_norm(x, weight.requires_grad_(), EPS).cos().sum(), (x, weight))
    assert torch.equal(frozen, trained)


def test_zero_rows_no_rows_and_repeatability(device):
    weight = torch.rand(16, device=device, requires_grad=True)
    zero = torch.zeros(3, 16, device=device, requires_grad=True)
    y = rms_norm.rms_norm(zero, weight, EPS)
    assert not y.any()
    (dx,) = torch.autograd.grad(y.sum(), zero)
    assert dx.isfinite().all()
    assert rms_norm.rms_norm(torch.zeros(0, 16, device=device), weight, EPS).shape == (0, 16)
    x = torch.randn(200, 16, device=device)
    runs = [torch.autograd.grad(rms_norm.rms_norm(x, weight, EPS).sin().sum(), weight)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_wrong_sizes_are_refused(device):
    with pytest.raises(ValueError, match="columns"):
        rms_norm.rms_norm(torch.zeros(2, 8, device=device), torch.ones(9, device=device), EPS)
    with pytest.raises(ValueError, match="wider"):
        rms_norm.rms_norm(torch.zeros(1, 65537, device=device), torch.ones(65537, device=device), EPS)


@pytest.mark.cuda
@pytest.mark.parametrize("form", rms_norm.FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 2048, 4096), (8192 * 4, 128), (1, 16384), (333, 14337)], ids=str)
def test_real_shapes(form, dtype, shape):
    x = torch.randn(shape, device="cuda", dtype=dtype)
    weight = torch.rand(shape[-1], device="cuda").to(dtype)
    verdict = compare(ours(form), stock(form), stock(form), (x, weight))
    assert verdict.ok, verdict.why


@pytest.mark.cuda
def test_more_than_2_31_elements():
    rows = 2**31 // 4096 + 3
    x = torch.empty(rows, 4096, device="cuda", dtype=torch.bfloat16)
    x[:-4] = 1.0
    x[-4:] = torch.randn(4, 4096, device="cuda")
    weight = torch.rand(4096, device="cuda").bfloat16()
    y = rms_norm.rms_norm(x, weight, EPS)
    torch.testing.assert_close(y[-4:], rms_norm.rms_norm_reference(x[-4:], weight, EPS), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("columns", [64, 128, 2048, 4096, 5120, 8192, 16384, 65536])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tensors", [2, 3])
def test_tiles_on_their_way_fit_into_the_shared_memory_of_every_gpu(columns, size, tensors):
    rows, block, _ = row_tile(columns)
    tile = rows * block * size * tensors
    ahead = rms_norm._stages(tile) - 1
    assert ahead * tile <= 96 * 1024  # of 99 on Ada
    if tile <= 48 * 1024:  # two programs on a processor
        assert ahead >= 1
        assert 2 * ahead * tile <= 96 * 1024
