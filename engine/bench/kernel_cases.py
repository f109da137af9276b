"""What each kernel is timed on: the shapes of Llama-3.1-8B, beside stock torch and Liger where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...kernels import adamw, fp8, glu, linear_cross_entropy, lora_add, lora_glu, nf4, residual, rms_norm, rope
from .kernel_checks import (
    BF16,
    DEVICE,
    EPS,
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    Q_HEADS,
    RANK,
    VOCABULARY,
    Function,
    adapters,
    mlp_adapters,
    mlp_weights,
    our_group,
    our_mlp,
    peft_group,
    peft_mlp,
    qkv_weights,
    quantised,
    randn,
)


@dataclass
class Case:
    """One operation to time.

    ``bytes`` or ``flops`` is what it must at least move or compute. ``graph``: it can be captured in a CUDA graph, so
    that its time on the device is known apart from that of the launches.
    """

    name: str
    ours: Function
    stock: Function | None = None
    liger: Function | None = None
    bytes: float = 0.0
    flops: float = 0.0
    graph: bool = True


def forward_backward(f: Callable[..., Any], inputs: list[torch.Tensor]) -> Function:
    """A call that runs ``f`` and its backward; for a scalar the gradient is 1."""

    def run() -> None:
        out = f(*inputs)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        torch.autograd.grad(outs, [t for t in inputs if t.requires_grad], [torch.ones_like(o) for o in outs])

    return run


def backward_only(f: Callable[..., Any], inputs: list[torch.Tensor]) -> Function:
    out = f(*inputs)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    leaves, seeds = [t for t in inputs if t.requires_grad], [torch.randn_like(o) for o in outs]
    return lambda: torch.autograd.grad(outs, leaves, seeds, retain_graph=True)


def liger(name: str) -> Callable[..., Any] | None:
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return getattr(functional, name, None)


def time_rms_norm(tokens: int) -> Iterator[Case]:
    x, w, other = randn(tokens, HIDDEN, grad=True), randn(HIDDEN), randn(tokens, HIDDEN)
    dy, size = randn(tokens, HIDDEN), 2.0 * tokens * HIDDEN
    _, rows, rstd = rms_norm.forward(x.detach(), w, EPS, "cast-first")
    theirs, reference = liger("liger_rms_norm"), lambda x: rms_norm.rms_norm_reference(x, w, EPS)
    yield Case(
        "rms_norm forward",
        lambda: rms_norm.forward(rows, w, EPS, "cast-first"),
        lambda: reference(rows),
        (lambda: theirs(rows, w, EPS)) if theirs else None,
        bytes=2 * size,
    )
    for trained in (False, True):
        weight = w.clone().requires_grad_(trained)
        yield Case(
            f"rms_norm backward, weight {'trained' if trained else 'frozen'}",
            partial(rms_norm.backward, dy, None, rows, w, rstd, "cast-first", weight_grad=trained),
            backward_only(lambda x, v: rms_norm.rms_norm_reference(x, v, EPS), [x, weight]),
            backward_only(lambda x, v: theirs(x, v, EPS), [x, weight]) if theirs else None,
            bytes=3 * size,
        )
    yield Case(
        "add + rms_norm forward",
        lambda: rms_norm.forward(rows, w, EPS, "cast-first", other),
        lambda: reference(rows + other),
        bytes=4 * size,
    )
    how = residual.Join(residual.Norm(w, EPS, "one-plus"))
    yield Case(
        "norm of a sublayer's output, added",
        lambda: residual.join_again(rows, other, how),
        lambda: rows + rms_norm.rms_norm_reference(other, w, EPS, "one-plus"),
        bytes=3 * size,
    )
    heads = randn(tokens * Q_HEADS, HEAD_DIM)
    small = randn(HEAD_DIM)
    yield Case(
        "rms_norm forward, heads of 128",
        lambda: rms_norm.forward(heads, small, EPS, "cast-first"),
        lambda: rms_norm.rms_norm_reference(heads, small, EPS),
        (lambda: theirs(heads, small, EPS)) if theirs else None,
        bytes=4.0 * heads.numel(),
    )


def time_glu(tokens: int) -> Iterator[Case]:
    gate, up = randn(tokens, INTERMEDIATE, grad=True), randn(tokens, INTERMEDIATE, grad=True)
    dh, size = randn(tokens, INTERMEDIATE), 2.0 * tokens * INTERMEDIATE
    theirs, (g, u) = liger("liger_swiglu"), (gate.detach(), up.detach())
    out = torch.empty_like(g), torch.empty_like(u)
    yield Case(
        "swiglu forward",
        lambda: glu.forward(g, u, "silu"),
        lambda: glu.glu_reference(g, u),
        (lambda: theirs(g, u)) if theirs else None,
        bytes=3 * size,
    )
    yield Case(
        "swiglu backward",
        lambda: glu.backward(dh, g, u, "silu", dgate=out[0], dup=out[1]),
        backward_only(glu.glu_reference, [gate, up]),
        backward_only(theirs, [gate.detach().clone().requires_grad_(), up]) if theirs else None,
        bytes=5 * size,
    )
    spare = [t.clone() for t in (dh, g, u)]
    yield Case(
        "swiglu backward in place, with h",
        lambda: glu.backward(*spare, "silu", dgate=spare[1], dup=spare[2], h=spare[0]),
        bytes=6 * size,
    )
    xa = randn(tokens, 2 * RANK).split(RANK, dim=1)
    b, dha = randn(2 * INTERMEDIATE, RANK).split(INTERMEDIATE), randn(tokens, RANK)
    yield Case(
        "gated unit with lora, forward",
        lambda: lora_glu.forward(g, u, (xa[0], xa[1]), (b[0], b[1]), (1.0, 1.0), "silu"),
        lambda: glu.glu_reference(g + xa[0] @ b[0].t(), u + xa[1] @ b[1].t()),
        bytes=3 * size,
    )
    yield Case(
        "gated unit with lora, backward in place",
        lambda: lora_glu.backward(dh, *spare[1:], (xa[0], xa[1]), (b[0], b[1]), (1.0, 1.0), "silu", dha),
        bytes=5 * size,
    )


def time_rope(tokens: int) -> Iterator[Case]:
    batch, length = max(1, tokens // 2048), min(tokens, 2048)
    q, k = (randn(batch, length, heads, HEAD_DIM).transpose(1, 2) for heads in (Q_HEADS, KV_HEADS))
    cos, sin = randn(1, length, HEAD_DIM), randn(1, length, HEAD_DIM)
    theirs = liger("liger_rope")
    for layout in rope.LAYOUTS[:2]:
        yield Case(
            f"rope {layout}",
            partial(rope.rope, q, k, cos, sin, layout),
            partial(rope.rope_reference, q, k, cos, sin, layout),
            partial(theirs, q, k, cos, sin) if theirs and layout == "half" else None,
            bytes=4.0 * (q.numel() + k.numel()),
        )


def time_cross_entropy(tokens: int) -> Iterator[Case]:
    labels = torch.randint(0, VOCABULARY, (tokens,), device=DEVICE)
    theirs = liger("liger_fused_linear_cross_entropy")
    for trained in (False, True):
        hidden, weight = randn(tokens, HIDDEN, grad=True), randn(VOCABULARY, HIDDEN, scale=0.02, grad=trained)
        flops = 2.0 * tokens * HIDDEN * VOCABULARY * (3 if trained else 2)

        def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy.linear_cross_entropy(h, w, labels, labelled=tokens)

        def stock(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy.linear_cross_entropy_reference(h, w, labels)

        yield Case(
            f"linear + cross-entropy, head {'trained' if trained else 'frozen'}, forward + backward",
            forward_backward(ours, [hidden, weight]),
            forward_backward(stock, [hidden, weight]),
            forward_backward(lambda h, w: theirs(h, w, labels), [hidden, weight]) if theirs else None,
            flops=flops,
            graph=False,
        )
    rows = min(tokens, linear_cross_entropy.CHUNK_ROWS)
    logits, losses = randn(rows, VOCABULARY, scale=3.0), torch.zeros(rows, device=DEVICE)
    figures = (labels[:rows], losses, torch.zeros(rows, dtype=torch.int32, device=DEVICE), losses)
    yield Case(
        f"rows of the loss, {rows} x {VOCABULARY}",
        lambda: linear_cross_entropy.rows_of_loss(logits, figures, 1.0, None, 0.0, "nll", gradient=True),
        bytes=4.0 * logits.numel(),
    )


def time_nf4(tokens: int) -> Iterator[Case]:
    """The largest weight and the smallest, whose launch takes as long as its bytes; and a layer's, one by one."""
    del tokens
    largest, smallest = (INTERMEDIATE, HIDDEN), (HIDDEN * KV_HEADS // Q_HEADS, HIDDEN)
    for name, shapes in (
        ("{} x {}".format(*largest), (largest,)),
        ("{} x {}".format(*smallest), (smallest,)),
        ("a layer's seven weights", (*[largest] * 3, *[(HIDDEN, HIDDEN)] * 2, *[smallest] * 2)),
    ):
        found = [quantised(*shape) for shape in shapes]
        states = [state for state, _ in found if state is not None]
        outs = [torch.empty(*shape, dtype=BF16, device=DEVICE) for shape in shapes]
        if len(states) == len(shapes):
            yield Case(
                f"nf4 {name} (stock: bitsandbytes)",
                partial(_each, [partial(nf4.dequantise, *pair) for pair in zip(states, outs, strict=True)]),
                partial(_each, [stock for _, stock in found]),
                bytes=sum(out.numel() for out in outs) * (2 + 0.516),
            )


def _each(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def time_lora(tokens: int) -> Iterator[Case]:
    x = randn(tokens, HIDDEN, grad=True)
    qkv = qkv_weights()
    qkv_small = [t for w in qkv for t in adapters(w.shape[0], HIDDEN)]
    mlp, mlp_small = mlp_weights(), mlp_adapters()
    for name, weights, small, ours, stock in (
        ("q, k, v", qkv, qkv_small, our_group(qkv), peft_group(qkv)),
        ("mlp", mlp, mlp_small, our_mlp(mlp), peft_mlp(mlp)),
    ):
        yield Case(
            f"lora {name}, forward + backward",
            forward_backward(ours, [x, *small]),
            forward_backward(stock, [x, *small]),
            flops=4.0 * tokens * sum(w.numel() for w in weights),
            graph=False,
        )


def time_fp8(tokens: int) -> Iterator[Case]:
    wide = 2 * INTERMEDIATE
    x, dy = randn(tokens, HIDDEN), randn(tokens, wide)
    dense = randn(wide, HIDDEN, scale=0.02)
    weight = fp8.quantise_weight(dense)
    made, size = fp8.quantise(x), float(tokens * HIDDEN)
    fold = weight.scale.to(BF16)  # as ``fp8.input_gradient`` hands it over
    yield Case(f"fp8 quantise {HIDDEN} columns", partial(fp8.quantise, x), bytes=3 * size)
    yield Case(
        f"fp8 quantise {wide} columns, scales folded in",
        partial(fp8.quantise, dy, fold),
        bytes=3.0 * dy.numel(),
    )
    yield Case(f"fp8 transpose {wide} x {HIDDEN}", partial(fp8.transposed, weight.data), bytes=2.0 * dense.numel())
    xa, b = randn(tokens, RANK), randn(HIDDEN, RANK)
    y, residual = randn(tokens, HIDDEN), randn(tokens, HIDDEN)
    yield Case(
        "fp8 add adapter and residual to a product",
        lambda: lora_add.add_to(y, residual, None, xa, b, 2.0),
        lambda: torch.addmm(y, xa, b.t(), out=y).add_(residual),
        bytes=6 * size,
    )
    yield Case(
        "adapter and residual before a product",
        lambda: lora_add.add_to(y, residual, None, xa, b, 2.0, keep=False),
        lambda: torch.addmm(residual, xa, b.t(), alpha=2.0, out=y),
        bytes=4 * size,
    )
    flops = 2.0 * tokens * dense.numel()
    yield Case(
        "fp8 product, gate and up (stock: bf16)", partial(fp8.product, made, weight), lambda: x @ dense.t(), flops=flops
    )
    yield Case(
        "fp8 gradient, gate and up (stock: bf16)",
        partial(fp8.input_gradient, dy, weight),
        lambda: dy @ dense,
        flops=flops,
    )


def time_adamw(tokens: int) -> Iterator[Case]:
    """Tensors of one decoder layer, four times over; the optimiser's own work in Python included."""
    del tokens
    shapes = [w.shape for w in (*qkv_weights(), *mlp_weights())] * 4
    for states, width in (("8bit", 2 + 8 / 256), ("bf16", 4), ("fp32", 8)):
        params = [randn(*shape, grad=True) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        n = float(sum(p.numel() for p in params))
        stock = bitsandbytes_adamw(params) if states == "8bit" else None
        if states == "bf16":
            stock = torch.optim.AdamW(params, fused=True).step
        ours: Any = adamw.AdamW(params, states=states)
        title = f"adamw, bf16 weights, {states} states" + (" (stock: bitsandbytes)" if states == "8bit" else "")
        yield Case(title, ours.step, stock, bytes=n * (6 + 2 * width), graph=False)


def bitsandbytes_adamw(params: list[torch.Tensor]) -> Function | None:
    try:
        import bitsandbytes
    except ImportError:
        return None
    step: Function = bitsandbytes.optim.AdamW8bit(params).step
    return step


TIMES = {
    "rms_norm": time_rms_norm, "glu": time_glu, "rope": time_rope, "linear_cross_entropy": time_cross_entropy,
    "nf4": time_nf4, "fp8": time_fp8, "adamw": time_adamw, "lora": time_lora,
}  # fmt: skip
