"""Gated units against float64, and the in-place backward that a fused MLP relies on."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import glu
from finetui.kernels.selfcheck import compare

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1/(1 + e^x) in the interpreter
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def ours(activation):
    return lambda g, u: glu.glu(g, u, activation)


def stock(activation):
    return lambda g, u: glu.glu_reference(g, u, activation)


@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 33), (2, 1030)], ids=str)
def test_output_and_gradients_are_as_close_to_float64_as_stock(device, activation, dtype, shape):
    torch.manual_seed(1)
    gate, up = (torch.randn(shape, device=device).mul(3).to(dtype) for _ in range(2))
    verdict = compare(ours(activation), stock(activation), stock(activation), (gate, up))
    assert verdict.ok, verdict.why


@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
def test_far_from_zero(device, activation):
    gate = torch.tensor([-1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 200.0, 1e4], device=device, requires_grad=True)
    up = torch.ones_like(gate)
    (got,) = torch.autograd.grad(glu.glu(gate, up, activation).sum(), gate)
    (expected,) = torch.autograd.grad(glu.glu_reference(gate, up, activation).sum(), gate)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_halves_of_one_projection_and_expanded_gradient(device):
    merged = torch.randn(2, 3, 130, device=device, requires_grad=True)
    (got,) = torch.autograd.grad(glu.glu(*merged.chunk(2, dim=-1)).sum(), merged)
    (expected,) = torch.autograd.grad(glu.glu_reference(*merged.chunk(2, dim=-1)).sum(), merged)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strided", [False, True])
def test_backward_over_its_own_inputs(device, strided):
    if strided:
        gate, up = torch.randn(4, 80, device=device).chunk(2, dim=-1)
    else:
        gate, up = torch.randn(4, 40, device=device), torch.randn(4, 40, device=device)
    dh = torch.randn(4, 40, device=device)
    g, u = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = glu.glu_reference(g, u)
    expected = (*torch.autograd.grad(h, (g, u), dh.clone()), h.detach())
    glu.backward(dh, gate, up, "silu", dgate=gate, dup=up, h=dh)
    torch.testing.assert_close((gate, up, dh), expected, rtol=1e-5, atol=1e-6)


def test_backward_twice_over_one_graph(device):
    gate, up = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    loss = glu.glu(gate, up).square().sum()
    first = torch.autograd.grad(loss, (gate, up), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (gate, up)), strict=True))


def test_nothing_and_mismatch(device):
    empty = torch.zeros(0, 5, device=device, requires_grad=True)
    glu.glu(empty, empty).sum().backward()
    assert empty.grad.shape == (0, 5)
    with pytest.raises(ValueError, match="differ"):
        glu.glu(torch.zeros(2, 4, device=device), torch.zeros(2, 5, device=device))


@pytest.mark.cuda
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2048, 14336), (513, 11008), (7, 18432)], ids=str)
def test_real_shapes(activation, dtype, shape):
    gate, up = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    verdict = compare(ours(activation), stock(activation), stock(activation), (gate, up))
    assert verdict.ok, verdict.why


@pytest.mark.cuda
def test_more_than_2_31_elements():
    rows = 2**31 // 14336 + 2
    gate, up = (torch.ones(rows, 14336, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate[-1].normal_()
    h = glu.glu(gate, up)
    torch.testing.assert_close(h[-1], glu.glu_reference(gate[-1], up[-1]), rtol=2e-2, atol=1e-2)
