"""What only a GPU shows of the single kernels: sizes past 2³¹ values, bits that stay the same, memory of any layout."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import glu, linear_cross_entropy, nf4, rms_norm, rope

pytestmark = pytest.mark.cuda
BF16 = torch.bfloat16


def randn(*shape, dtype=BF16, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


NAMES = (
    "rms_norm", "rms_norm of heads", "rms_norm, odd width", "add_rms_norm", "glu, halves of one product", "rope",
    "rope, interleaved", "linear_cross_entropy",
)  # fmt: skip


def operations():
    """By name: a function of tensors, and those tensors, at the shapes of an 8B model and as models lay them out."""
    merged = randn(4096, 28672)
    heads = randn(2, 2048, 48, 128)
    cos, sin = randn(1, 2048, 128), randn(1, 2048, 128)
    weight = randn(4096)
    labels = torch.randint(0, 32000, (4096,), device="cuda")
    labels[::3] = -100
    return {
        "rms_norm": (lambda x, w: rms_norm.rms_norm(x, w, 1e-5), [randn(4096, 4096), weight]),
        "rms_norm of heads": (lambda x, w: rms_norm.rms_norm(x, w, 1e-5), [heads[:, :, :32], randn(128)]),
        "rms_norm, odd width": (
            lambda x, w: rms_norm.rms_norm(x, w, 1e-5, "one-plus"), [randn(777, 5121), randn(5121)]
        ),
        "add_rms_norm": (
            lambda x, r, w: rms_norm.add_rms_norm(x, r, w, 1e-5)[0], [randn(4096, 4096), randn(4096, 4096), weight]
        ),
        "glu, halves of one product": (glu.glu, [merged[:, :14336], merged[:, 14336:]]),
        "rope": (
            lambda q, k: torch.cat([t.flatten() for t in rope.rope(q, k, cos, sin)]),
            [heads[:, :, :32].transpose(1, 2), heads[:, :, 32:40].transpose(1, 2)],
        ),
        "rope, interleaved": (
            lambda q, k: torch.cat([t.flatten() for t in rope.rope(q, k, cos, sin, "interleaved")]),
            [heads[:, :, :32].transpose(1, 2), heads[:, :, 32:40].transpose(1, 2)],
        ),
        "linear_cross_entropy": (
            lambda h, w: linear_cross_entropy.linear_cross_entropy(h, w, labels),
            [randn(4096, 2048), randn(32000, 2048, scale=0.02)],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_same_bits_each_time(name):
    torch.manual_seed(0)
    function, inputs = operations()[name]
    dy = None

    def run():
        nonlocal dy
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves)
        dy = torch.randn_like(out) if dy is None else dy
        return [out.detach(), *torch.autograd.grad(out, leaves, dy)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
        assert first.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_without_strides_is_like_one_with(name):
    torch.manual_seed(0)
    function, inputs = operations()[name]

    def run(expanded):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves)
        ones = torch.ones((), device="cuda", dtype=out.dtype)
        return torch.autograd.grad(out, leaves, ones.expand(out.shape) if expanded else torch.ones_like(out))

    for expanded, dense in zip(run(expanded=True), run(expanded=False), strict=True):
        assert torch.equal(expanded, dense)


def test_rms_norm_past_two_to_the_31():
    x = randn(2**19 + 4, 4096)
    weight = randn(4096)
    y, rows, rstd = rms_norm.forward(x, weight, 1e-5, "cast-first")
    expected, _, last = rms_norm.forward(x[-4:].contiguous(), weight, 1e-5, "cast-first")
    assert torch.equal(y[-4:], expected)
    for trained in (False, True):
        dx, dweight = rms_norm.backward(y, None, rows, weight, rstd, "cast-first", weight_grad=trained)
        few, _ = rms_norm.backward(expected, None, x[-4:].contiguous(), weight, last, "cast-first", weight_grad=False)
        assert torch.equal(dx[-4:], few)
    assert dweight.isfinite().all()
    assert dweight.any()


def test_glu_of_rows_apart_past_two_to_the_31():
    gate = randn(2**17 + 2, 16400)
    strided = gate[:, :16392]
    h = glu.forward(strided, strided, "silu")
    assert torch.equal(h[-2:], glu.forward(strided[-2:].contiguous(), strided[-2:].contiguous(), "silu"))


@pytest.mark.parametrize("layout", rope.LAYOUTS)
def test_rope_past_two_to_the_31(layout):
    q = randn(1, 2**17 + 2, 130, 128).transpose(1, 2)
    k, cos, sin = randn(1, 1, 2**17 + 2, 128), randn(1, 2**17 + 2, 128), randn(1, 2**17 + 2, 128)
    out, _ = rope.rotate(q, k, cos, sin, layout)
    few, _ = rope.rotate(q[:, :, -2:].contiguous(), k[:, :, -2:], cos[:, -2:], sin[:, -2:], layout)
    assert torch.equal(out[:, :, -2:], few)


def test_nf4_past_two_to_the_31():
    functional = pytest.importorskip("bitsandbytes.functional")
    part, state = functional.quantize_4bit(randn(64, 4096), quant_type="nf4", compress_statistics=False)
    times = 2**31 // (64 * 4096) + 1
    whole = nf4.NF4(
        part.reshape(-1).repeat(times), state.absmax.repeat(times), state.code.float(), 64, (64 * times, 4096), BF16
    )
    out = nf4.dequantise(whole)
    expected = functional.dequantize_4bit(part, state)
    assert torch.equal(out[-64:], expected)
    assert torch.equal(out[:64], expected)


def test_a_batch_without_a_label_has_no_loss_and_no_gradient():
    hidden, weight = randn(2048, 1024).requires_grad_(), randn(128256, 1024, scale=0.02).requires_grad_()
    labels = torch.full((2048,), -100, device="cuda")
    loss = linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, labelled=64)
    gradients = torch.autograd.grad(loss, [hidden, weight])
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients)


def test_logits_past_two_to_the_31():
    """In one chunk, so that offsets within it pass 2³¹."""
    hidden, weight = randn(17000, 256), randn(128256, 256, scale=0.02)
    labels = torch.randint(0, 128256, (17000,), device="cuda")
    labels[:16990] = -100
    whole = linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, labelled=17000, chunk_rows=17000)
    few = linear_cross_entropy.linear_cross_entropy(hidden[16990:], weight, labels[16990:])
    torch.testing.assert_close(whole, few, rtol=1e-5, atol=0)
