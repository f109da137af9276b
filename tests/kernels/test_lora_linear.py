"""LoRA layers alone, in groups and as a whole MLP, against float64; dense and NF4 weights."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import glu, lora_linear, nf4
from finetui.kernels.lora_linear import Part
from finetui.kernels.selfcheck import compare

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IN = 24


def tensors(device, dtype, *shapes, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * scale).to(device, dtype) for shape in shapes]


def layers(weights, adapters, scalings, biases):
    """Parts in the dtype of the adapters, so that the same recipe serves float64."""
    dtype = adapters[0].dtype
    return [
        Part(w.to(dtype), adapters[2 * i], adapters[2 * i + 1], s, b.to(dtype) if b is not None else None)
        for i, (w, s, b) in enumerate(zip(weights, scalings, biases, strict=True))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outs", "ranks"), [((20,), (1,)), ((20, 8, 8), (4, 3, 5))])
def test_a_group_is_as_close_to_float64_as_peft(device, dtype, outs, ranks):
    weights = tensors(device, dtype, *((n, IN) for n in outs))
    bias = [tensors(device, dtype, (outs[0],))[0], *[None] * (len(outs) - 1)]
    adapters = [t for n, r in zip(outs, ranks, strict=True) for t in tensors(device, dtype, (r, IN), (n, r))]
    scalings = [0.7, 2.0, 1.0][: len(outs)]

    def ours(x, *adapters):
        return lora_linear.lora_group(x, layers(weights, adapters, scalings, bias))

    def stock(x, *adapters):
        return tuple(lora_linear.lora_linear_reference(x, p) for p in layers(weights, adapters, scalings, bias))

    verdict = compare(ours, stock, stock, (*tensors(device, dtype, (3, 7, IN), scale=1.0), *adapters))
    assert verdict.ok, verdict.why


@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_mlp_is_as_close_to_float64_as_peft(device, dtype, activation):
    weights = tensors(device, dtype, (20, IN), (20, IN), (IN, 20))
    adapters = tensors(device, dtype, (4, IN), (20, 4), (2, IN), (20, 2), (4, 20), (IN, 4))
    bias = [None, None, tensors(device, dtype, (IN,))[0]]

    def ours(x, *adapters):
        return lora_linear.lora_mlp(x, *layers(weights, adapters, (2.0, 0.7, 1.0), bias), activation)

    def stock(x, *adapters):
        gate, up, down = layers(weights, adapters, (2.0, 0.7, 1.0), bias)
        linear = lora_linear.lora_linear_reference
        return linear(glu.glu_reference(linear(x, gate), linear(x, up), activation), down)

    verdict = compare(ours, stock, stock, (*tensors(device, dtype, (3, 7, IN), scale=1.0), *adapters))
    assert verdict.ok, verdict.why


def test_nf4_weights_give_what_their_dense_form_gives(device):
    functional = pytest.importorskip("bitsandbytes.functional")
    parts, dense = [], []
    for n in (64, 16):
        packed, state = functional.quantize_4bit(
            tensors(device, torch.float16, (n, 64))[0], quant_type="nf4", compress_statistics=True
        )
        packed.quant_state = state
        a, b = (t.requires_grad_() for t in tensors(device, torch.float16, (4, 64), (n, 4)))
        parts.append(Part(nf4.nf4_state(packed), a, b, 0.5))
        dense.append(Part(functional.dequantize_4bit(packed, state), a, b, 0.5))
    x = tensors(device, torch.float16, (5, 64))[0].requires_grad_()
    results = []
    for group in (parts, dense):
        outs = lora_linear.lora_group(x, group)
        seeds = [torch.ones_like(out) for out in outs]
        leaves = [x, *(t for part in group for t in (part.a, part.b))]
        results.append([*outs, *torch.autograd.grad(outs, leaves, seeds)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fp32_adapters_under_autocast_keep_their_dtype_in_the_gradient(device):
    weight = tensors(device, torch.bfloat16, (20, IN))[0]
    a, b = (t.requires_grad_() for t in tensors(device, torch.float32, (4, IN), (20, 4)))
    x = tensors(device, torch.float32, (5, IN))[0].requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = lora_linear.lora_linear(x, Part(weight, a, b, 1.0))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (a.grad.dtype, b.grad.dtype, x.grad.dtype) == (torch.float32,) * 3
    assert a.grad.any()
    assert b.grad.any()


def test_frozen_input_transposed_input_and_expanded_gradient(device):
    weight, a, b = tensors(device, torch.float32, (20, IN), (4, IN), (20, 4))
    part = Part(weight, a.requires_grad_(), b.requires_grad_(), 1.5)
    x = tensors(device, torch.float32, (IN, 6))[0].t()
    got = torch.autograd.grad(lora_linear.lora_linear(x, part).sum(), (a, b))
    expected = torch.autograd.grad(lora_linear.lora_linear_reference(x, part).sum(), (a, b))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_second_backward_of_a_fused_mlp_is_refused(device):
    weights = tensors(device, torch.float32, (20, IN), (20, IN), (IN, 20))
    adapters = tensors(device, torch.float32, (4, IN), (20, 4), (4, IN), (20, 4), (4, 20), (IN, 4))
    parts = layers(weights, [t.requires_grad_() for t in adapters], (1.0,) * 3, (None,) * 3)
    y = lora_linear.lora_mlp(torch.randn(3, IN, device=device), *parts, "silu").sum()
    torch.autograd.grad(y, adapters, retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(y, adapters)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_shapes(dtype):
    device = torch.device("cuda")
    weights = tensors(device, dtype, (4096, 4096), (1024, 4096), (1024, 4096), scale=0.02)
    adapters = [t for n in (4096, 1024, 1024) for t in tensors(device, dtype, (16, 4096), (n, 16), scale=0.02)]

    def ours(x, *adapters):
        return lora_linear.lora_group(x, layers(weights, adapters, (2.0,) * 3, (None,) * 3))

    def stock(x, *adapters):
        return tuple(
            lora_linear.lora_linear_reference(x, p) for p in layers(weights, adapters, (2.0,) * 3, (None,) * 3)
        )

    verdict = compare(ours, stock, stock, (*tensors(device, dtype, (777, 4096), scale=1.0), *adapters))
    assert verdict.ok, verdict.why
