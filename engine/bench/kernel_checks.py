"""Whether each kernel is right at the shapes of Llama-3.1-8B: errors against float64 beside those of stock torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ...kernels import adamw, fp8, glu, linear_cross_entropy, lora_linear, nf4, rms_norm, rope
from ...kernels.lora_linear import Part
from ...kernels.selfcheck import Verdict, compare

HIDDEN, INTERMEDIATE, VOCABULARY, Q_HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 128256, 32, 8, 128
RANK, EPS, DEVICE = 16, 1e-5, "cuda"
BF16 = torch.bfloat16
Function = Callable[[], Any]


def randn(*shape: int, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(BF16).requires_grad_(grad)


def adapters(out: int, width: int) -> list[torch.Tensor]:
    return [randn(RANK, width, scale=0.02, grad=True), randn(out, RANK, scale=0.02, grad=True)]


def parts(weights: list[torch.Tensor], small: tuple[torch.Tensor, ...]) -> list[Part]:
    dtype = small[0].dtype
    return [Part(w.to(dtype), small[2 * i], small[2 * i + 1], 2.0) for i, w in enumerate(weights)]


def peft_group(weights: list[torch.Tensor]) -> Callable[..., Any]:
    return lambda x, *small: tuple(lora_linear.lora_linear_reference(x, part) for part in parts(weights, small))


def peft_mlp(weights: list[torch.Tensor]) -> Callable[..., Any]:
    def run(x: torch.Tensor, *small: torch.Tensor) -> torch.Tensor:
        gate, up, down = parts(weights, small)
        linear = lora_linear.lora_linear_reference
        return linear(glu.glu_reference(linear(x, gate), linear(x, up)), down)

    return run


def our_group(weights: list[torch.Tensor]) -> Callable[..., Any]:
    return lambda x, *small: lora_linear.lora_group(x, parts(weights, small))


def our_mlp(weights: list[torch.Tensor]) -> Callable[..., Any]:
    return lambda x, *small: lora_linear.lora_mlp(x, *parts(weights, small), "silu")


def qkv_weights() -> list[torch.Tensor]:
    return [randn(heads * HEAD_DIM, HIDDEN, scale=0.02) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]


def mlp_weights() -> list[torch.Tensor]:
    return [
        randn(n, k, scale=0.02) for n, k in ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    ]


def mlp_adapters() -> list[torch.Tensor]:
    shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    return [tensor for out, width in shapes for tensor in adapters(out, width)]


Checks = Iterator[tuple[str, Verdict]]
Variant = Callable[[Any], Callable[..., Any]]


def sweep(name: str, variants: Iterable[Any], ours: Variant, stock: Variant, inputs: Sequence[torch.Tensor]) -> Checks:
    for variant in variants:
        yield f"{name} {variant or ''}", compare(ours(variant), stock(variant), stock(variant), inputs)


def check_rms_norm() -> Checks:
    def ours(form: Any) -> Callable[..., Any]:
        return lambda x, w: rms_norm.rms_norm(x, w, EPS, form)

    def stock(form: Any) -> Callable[..., Any]:
        return lambda x, w: rms_norm.rms_norm_reference(x, w, EPS, form)

    for columns in (HIDDEN, HEAD_DIM):
        inputs = randn(2048, columns), randn(columns, scale=0.2)
        yield from sweep(f"rms_norm {columns}", rms_norm.FORMS, ours, stock, inputs)


def check_glu() -> Checks:
    def ours(act: Any) -> Callable[..., Any]:
        return lambda g, u: glu.glu(g, u, act)

    def stock(act: Any) -> Callable[..., Any]:
        return lambda g, u: glu.glu_reference(g, u, act)

    yield from sweep("glu", glu.ACTIVATIONS, ours, stock, (randn(1024, INTERMEDIATE), randn(1024, INTERMEDIATE)))


def check_rope() -> Checks:
    q, k = (randn(2, 1024, heads, HEAD_DIM).transpose(1, 2) for heads in (Q_HEADS, KV_HEADS))
    cos, sin = randn(2, 1024, HEAD_DIM), randn(2, 1024, HEAD_DIM)

    def ours(layout: Any) -> Callable[..., Any]:
        return lambda q, k: rope.rope(q, k, cos, sin, layout)

    def stock(layout: Any) -> Callable[..., Any]:
        return lambda q, k: rope.rope_reference(q, k, cos.to(q.dtype), sin.to(q.dtype), layout)

    yield from sweep("rope", rope.LAYOUTS, ours, stock, (q, k))


def check_cross_entropy() -> Checks:
    labels = torch.randint(0, VOCABULARY, (2048,), device=DEVICE)
    labels[torch.rand(2048, device=DEVICE) < 0.3] = -100

    def ours(options: Any) -> Callable[..., Any]:
        return lambda h, w: linear_cross_entropy.linear_cross_entropy(h, w, labels, **options)

    def stock(options: Any) -> Callable[..., Any]:
        return lambda h, w: linear_cross_entropy.linear_cross_entropy_reference(h, w, labels, **options)

    inputs = randn(2048, HIDDEN), randn(VOCABULARY, HIDDEN, scale=0.02)
    yield from sweep("linear_cross_entropy", ({}, {"softcap": 30.0}, {"z_loss": 1e-4}), ours, stock, inputs)


def check_nf4() -> Checks:
    state, expected = quantised(INTERMEDIATE, HIDDEN)
    if state is not None:
        same = torch.equal(nf4.dequantise(state), expected())
        yield "nf4 bit-exact", Verdict(same, "" if same else "bits differ from bitsandbytes")


def check_fp8() -> Checks:
    yield "fp8 products both ways", fp8.prove(torch.device(DEVICE))
    weight = randn(INTERMEDIATE, HIDDEN, scale=0.02)
    made = fp8.quantise_weight(weight)
    same = torch.equal(fp8.transposed(made.data), made.data.t())
    yield "fp8 transposition", Verdict(same, "" if same else "bytes differ")
    error = ((fp8.dequantise(made) - weight).norm() / weight.norm()).item()
    yield "fp8 rounding of a weight", Verdict(error < 0.028, f"{error:.4f} of the weight is lost")


def check_adamw() -> Checks:
    yield "adamw", adamw.prove(torch.device(DEVICE))


def check_lora() -> Checks:
    x, weights = randn(512, HIDDEN), qkv_weights()
    small = [t.detach() for w in weights for t in adapters(w.shape[0], HIDDEN)]
    stock = peft_group(weights)
    yield "lora q, k, v", compare(our_group(weights), stock, stock, (x, *small))
    weights, small = mlp_weights(), [t.detach() for t in mlp_adapters()]
    stock = peft_mlp(weights)
    yield "lora mlp", compare(our_mlp(weights), stock, stock, (x, *small))


def quantised(rows: int, columns: int) -> tuple[nf4.NF4 | None, Function]:
    try:
        from bitsandbytes import functional
    except ImportError:
        return None, lambda: None
    packed: Any
    packed, state = functional.quantize_4bit(
        randn(rows, columns, scale=0.02), quant_type="nf4", compress_statistics=True
    )
    packed.quant_state = state
    found = nf4.nf4_state(packed)
    assert isinstance(found, nf4.NF4), found
    return found, lambda: functional.dequantize_4bit(packed, state)


CHECKS = {
    "rms_norm": check_rms_norm, "glu": check_glu, "rope": check_rope, "linear_cross_entropy": check_cross_entropy,
    "nf4": check_nf4, "fp8": check_fp8, "adamw": check_adamw, "lora": check_lora,
}  # fmt: skip
