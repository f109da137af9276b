"""Kernels at the shapes of Llama-3.1-8B: first whether they are right, then how fast, beside stock torch and Liger.

    python -P tests/bench/kernels.py [--tokens 8192] [--only rms_norm glu …] [--json FILE] [--no-timing]

Needs a CUDA GPU and an importable ``finetui``; uses ``liger_kernel`` and ``bitsandbytes`` if they are there. Times are
medians of ``triton.testing.do_bench``, which empties the L2 cache between runs. A share is of what this GPU reached
here in a plain copy (for kernels that move memory) or in a plain bf16 product (for those that multiply). The table
comes last; the exit code is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from finetui.kernels import glu, linear_cross_entropy, lora_linear, nf4, rms_norm, rope
from finetui.kernels.lora_linear import Part
from finetui.kernels.selfcheck import Verdict, compare

HIDDEN, INTERMEDIATE, VOCABULARY, Q_HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 128256, 32, 8, 128
RANK, EPS, DEVICE = 16, 1e-5, "cuda"
BF16 = torch.bfloat16
Function = Callable[[], Any]


@dataclass
class Case:
    """One operation to time. ``bytes`` or ``flops`` is what it must at least move or compute."""

    name: str
    ours: Function
    stock: Function | None = None
    liger: Function | None = None
    bytes: float = 0.0
    flops: float = 0.0


@dataclass
class Timing:
    """Milliseconds, and the share of the copy or GEMM rate measured beside it."""

    name: str
    ours_ms: float
    stock_ms: float | None
    liger_ms: float | None
    rate: float
    unit: str
    share: float


def randn(*shape: int, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(BF16).requires_grad_(grad)


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


def time_rms_norm(tokens: int) -> Iterator[Case]:
    x, w, residual = randn(tokens, HIDDEN, grad=True), randn(HIDDEN), randn(tokens, HIDDEN)
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
        lambda: rms_norm.forward(rows, w, EPS, "cast-first", residual),
        lambda: reference(rows + residual),
        bytes=4 * size,
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
        )


def time_nf4(tokens: int) -> Iterator[Case]:
    del tokens
    for rows, columns in ((INTERMEDIATE, HIDDEN), (1024, HIDDEN)):
        state, stock = quantised(rows, columns)
        if state is not None:
            out = torch.empty(rows, columns, dtype=BF16, device=DEVICE)
            yield Case(
                f"nf4 {rows} x {columns} (stock: bitsandbytes)",
                partial(nf4.dequantise, state, out),
                stock,
                bytes=rows * columns * (2 + 0.516),
            )


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
        )


CHECKS = {
    "rms_norm": check_rms_norm, "glu": check_glu, "rope": check_rope, "linear_cross_entropy": check_cross_entropy,
    "nf4": check_nf4, "lora": check_lora,
}  # fmt: skip
TIMES = {
    "rms_norm": time_rms_norm, "glu": time_glu, "rope": time_rope, "linear_cross_entropy": time_cross_entropy,
    "nf4": time_nf4, "lora": time_lora,
}  # fmt: skip


def median_ms(function: Function | None, name: str) -> float | None:
    if function is None:
        return None
    try:
        return float(do_bench(function, warmup=50, rep=200, return_mode="median"))
    except Exception as error:  # a peer that cannot run this is a gap in the table, not the end of it
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return None


def ceilings() -> tuple[float, float]:
    """(bytes/s of a copy, FLOP/s of a bf16 product) on this GPU, with random data."""
    source, target = randn(2**28), torch.empty(2**28, dtype=BF16, device=DEVICE)
    copy = 4.0 * 2**28 / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)
    a, b = randn(8192, HIDDEN), randn(INTERMEDIATE, HIDDEN)
    product = 2.0 * 8192 * HIDDEN * INTERMEDIATE / (do_bench(lambda: a @ b.t(), return_mode="median") * 1e-3)
    return copy, product


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-timing", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU", file=sys.stderr)
        return 2
    # Liger imports transformers, which looks for a module named "kernels" and must not find this file.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    torch.manual_seed(0)
    verdicts: dict[str, Verdict] = {}
    for name in options.only:
        try:
            for label, verdict in CHECKS[name]():
                verdicts[label] = verdict
                print(f"{label}: {'ok' if verdict.ok else 'WRONG'} {verdict.why}", file=sys.stderr)
        except Exception as error:  # told in the table; the other kernels are still worth looking at
            verdicts[name] = Verdict(False, f"{type(error).__name__}: {str(error)[:500]}")
            print(f"{name}: {verdicts[name].why}", file=sys.stderr)
        torch.cuda.empty_cache()
    timings: list[Timing] = []
    copy, product = (0.0, 0.0) if options.no_timing else ceilings()
    for name in [] if options.no_timing else options.only:
        for case in TIMES[name](options.tokens):
            ours = median_ms(case.ours, case.name)
            if ours is not None:
                rate, top = (case.bytes, copy) if case.bytes else (case.flops, product)
                rate /= ours * 1e-3
                stock, peer = median_ms(case.stock, f"{case.name}, stock"), median_ms(case.liger, f"{case.name}, Liger")
                scaled, unit = (rate / 1e9, "GB/s") if case.bytes else (rate / 1e12, "TFLOP/s")
                timings.append(Timing(case.name, ours, stock, peer, scaled, unit, rate / top))
            torch.cuda.empty_cache()
    report = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "tokens": options.tokens, "copy_gb_per_s": copy / 1e9, "gemm_tflop_per_s": product / 1e12,
        "verdicts": {name: asdict(verdict) for name, verdict in verdicts.items()},
        "timings": [asdict(timing) for timing in timings],
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    print(
        f"{report['gpu']}, torch {torch.__version__}, triton {triton.__version__}, {options.tokens} tokens, bf16; ",
        end="",
    )
    print(f"copy {copy / 1e9:.0f} GB/s, GEMM {product / 1e12:.0f} TFLOP/s")
    for label, verdict in verdicts.items():
        outcome = f"ok, at worst {verdict.worst:.2f} x stock's error" if verdict.ok else f"WRONG: {verdict.why}"
        print(f"{label:<44} {outcome}")
    print(f"\n{'':<58}{'ours ms':>9}{'stock':>9}{'Liger':>9}{'rate':>9}         share")
    for t in timings:
        peers = "".join(f"{ms:9.3f}" if ms is not None else f"{'-':>9}" for ms in (t.stock_ms, t.liger_ms))
        print(f"{t.name:<58}{t.ours_ms:9.3f}{peers}{t.rate:9.0f} {t.unit:<8}{t.share:6.0%}")
    return 0 if all(verdict.ok for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
