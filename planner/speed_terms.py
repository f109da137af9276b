"""The terms of a step's time as formulas with numbers, in seconds; the figures are those of :mod:`.speed`."""

from __future__ import annotations

from .architecture import Architecture
from .fused import stack_on
from .hardware import Gpu
from .memory_terms import Reckoned
from .methods import stack_for
from .settings import Settings
from .speed import (
    BANDWIDTH_SHARE,
    FP8_GAIN,
    STEP_EFFICIENCY,
    WHOLE_LAYERS_EFFICIENCY,
    attention_flops,
    fill,
    has_fp8,
    matmul_flops,
    shortened,
    step_speed,
)  # fmt: skip
from .stacks import Stack
from .traffic import dequantized_bytes, elementwise_bytes, launches, optimizer_traffic

_WORDS = {
    "launch": "the GPU waits for the next kernel",
    "reference": "forward passes of the frozen reference, and others without gradients",
    "parking": "the GPU waits for what is copied to and from host memory",
    "communication": "gradients and weights that devices send each other, less what goes on beside the arithmetic",
    "rollout": "answers are generated: all weights are read for each token",
    "offload": "optimiser states and weights that are copied to and from host memory",
}


def speed_parts(
    architecture: Architecture,
    settings: Settings,
    stack: Stack,
    gpu: Gpu,
    *,
    useful: float = 1.0,
    mean_length: float | None = None,
) -> dict[str, Reckoned]:
    """Each term of :attr:`.plan.Speed.terms` with its formula and its parts; arguments as of :func:`.step_speed`."""
    total = step_speed(architecture, settings, stack, gpu, useful=useful, mean_length=mean_length)
    settings = settings.under(stack)
    stack = stack_for(settings.method, stack_on(architecture, settings, stack, gpu))
    tokens, times = settings.tokens, settings.accumulation
    peak = gpu.bf16_tflops if settings.compute_bytes == 2 else gpu.fp32_tflops
    efficiency = WHOLE_LAYERS_EFFICIENCY if stack.whole_layers or stack.compiled else STEP_EFFICIENCY
    filled = fill(tokens, gpu)
    rate = peak * gpu.achievable * efficiency * filled
    bandwidth = gpu.bandwidth_gb_s * BANDWIDTH_SHARE
    in_8_bits = (settings.quantization == "fp8" or settings.fp8_products) and has_fp8(gpu)
    gain = FP8_GAIN if in_8_bits else 1.0
    forward, backward, recompute = matmul_flops(architecture, settings, stack)
    reaches = (
        f"rate = {peak:,.0f} TFLOP/s × {gpu.achievable:.0%} of the best product × {efficiency:.0%} in a training step "
        f"× {filled:.0%} filled by {tokens:,} tokens = {rate:,.1f} TFLOP/s"
    )
    again = f" × {times} micro-batches" if times > 1 else ""
    found: dict[str, Reckoned] = {}
    for name, flops in (
        ("forward", shortened(forward, architecture, gain)),
        ("backward", shortened(backward, architecture, gain)),
        ("recompute", recompute / gain),
    ):
        how = f"{tokens:,} tokens × {flops / 1e9:,.2f} GFLOP ÷ {rate:,.1f} TFLOP/s{again}"
        found[name] = (
            f"tokens × FLOPs a token ÷ rate; {reaches}",
            "2 FLOPs per weight in forward; backward as many for inputs, and again for trained weights",
            [("matrix products", how, tokens * flops / (rate * 1e12) * times)],
        )
    span = min(mean_length or settings.sequence_length, settings.sequence_length)
    attention = attention_flops(architecture, span)
    seconds = total.terms.get("attention", 0.0)
    found["attention"] = (
        "tokens × FLOPs a token ÷ what the attention kernel reaches, over all passes",
        "arXiv:2307.08691, arXiv:2407.08608, and an H200",
        [(
            f"over {span:,.0f} tokens",
            f"{tokens:,} tokens × {attention / 1e6:,.1f} MFLOP a forward pass{again}",
            seconds,
        )],
    )  # fmt: skip
    moved = elementwise_bytes(architecture, settings, stack)
    found["elementwise"] = (
        "tokens × bytes read and written a token ÷ memory bandwidth",
        "",
        [(
            "norms, rotary embedding, activation, residuals, adapters' sums, loss",
            f"{tokens:,} tokens × {moved / 1e6:,.1f} MB ÷ {bandwidth:,.0f} GB/s{again}",
            tokens * moved / (bandwidth * 1e9) * times,
        )],
    )  # fmt: skip
    unpacked = dequantized_bytes(architecture, settings, stack, in_8_bits=in_8_bits)
    found["dequantize"] = (
        "bytes of packed weights read and of unpacked ones written and read ÷ memory bandwidth",
        "",
        [(
            "unpacking weights",
            f"{unpacked / 1e9:,.1f} GB ÷ {bandwidth:,.0f} GB/s{again}",
            unpacked / (bandwidth * 1e9) * times,
        )],
    )  # fmt: skip
    update = optimizer_traffic(architecture, settings, stack)
    found["optimizer"] = (
        "bytes of weights, gradients and states ÷ memory bandwidth, once a step",
        "",
        [("update", f"{update / 1e9:,.3g} GB ÷ {bandwidth:,.0f} GB/s", total.terms.get("optimizer", 0.0))],
    )
    for name, words in _WORDS.items():
        if name not in total.terms:
            continue
        how = f"{sum(launches(architecture, settings, stack)):,.0f} kernels a micro-batch" if name == "launch" else ""
        if name == "reference":
            how = f"{settings.beside.forwards:g} further forward passes{again}"
        found[name] = (words, "", [(name, how, total.terms[name])])
    return {name: found[name] for name in total.terms if name in found}
