"""Time of one optimiser step, term by term: a roofline.

FLOPs per token of a forward pass are 2 per weight it is multiplied with, and 2 x q x S for causal attention over S
tokens (half of the full square; within a window, over the window). A backward pass costs as much again for the input's
gradient, and once more where the weight is trained, so frozen weights need 4 instead of 6 (8 instead of 6 with
checkpointing, 6 instead of 4 frozen). FlashAttention-2's backward is 2.5 forwards (arXiv:2307.08691).

Matrix products run at ``achievable`` of the peak at best, less for small ones; elementwise work, dequantisation and
the optimiser at the speed of memory; kernels can't start faster than they are launched.
"""

from __future__ import annotations

from functools import lru_cache

from .architecture import Architecture
from .hardware import Gpu
from .memory import Settings, kv_cache_bytes, stack_on
from .methods import COMPLETION_TOKENS, METHODS, stack_for
from .plan import Speed
from .sharding import sent_bytes
from .stacks import Stack
from .storage import QUANTIZED_BYTES

#: What a training step gets of the best matrix product: shapes differ from the best one, and launches leave gaps.
#: Chosen so that llama-shaped 7B runs on A100-80GB at 16k tokens land on their measured 3,063 to 3,354 tokens/s.
_STEP_EFFICIENCY = 0.86
#: Tokens at which matrix products reach half of that; smaller micro-batches can't fill the device.
_HALF_TOKENS = 160.0
#: Share of peak bandwidth that elementwise kernels see.
_BANDWIDTH_SHARE = 0.8
#: Seconds from one kernel to the next under PyTorch eager on a usual host.
_LAUNCH_S = 7e-6
#: The same on a CPU, where each operation also starts and joins its threads.
_LAUNCH_CPU_S = 20e-6
#: Kernels of one eager layer's forward: norms, rotary, attention, MLP; and further ones for each LoRA pair.
_KERNELS, _KERNELS_LORA = 42, 5
#: Share of a link's nominal speed that ring all-reduce gets (235 of 300 GB/s on NVLink 3).
_LINK_SHARE = 0.78
#: The same over PCIe, between cards that reach each other's memory, and through the host's.
_PCIE_SHARE, _STAGED_SHARE = 0.6, 0.2
#: Bytes that unpacking a GPTQ weight moves where it is trained on: shifts to int32, masks, casts and scales are torch
#: operations of their own (auto_gptq's trainable path).
_GPTQ_BYTES = 20.0
#: Share of the ring's speed that ZeRO-3's gathers reach: weights are copied into and out of its buffers.
_LIVE_SHARE = 0.5
#: Share of compute that communication hides behind, and the share of itself that never hides.
_OVERLAP, _EXPOSED = 0.7, 0.1
#: Host memory bandwidth that a CPU Adam gets, in bytes per second.
_HOST_BYTES_S = 60e9


def step_speed(
    architecture: Architecture,
    settings: Settings,
    stack: Stack,
    gpu: Gpu,
    *,
    useful: float = 1.0,
    mean_length: float | None = None,
) -> Speed:
    """Predict one optimiser step.

    Args:
        useful: share of the tokens in a batch that are not padding.
        mean_length: tokens that attention spans, where that is less than the sequence length; ignored under a mask.

    Returns:
        tokens/s over all devices, padding not counted; ``mfu`` is useful model FLOPs (6 N per token, 4 N frozen, no
        recomputation) over the device's peak.
    """
    stack = stack_for(settings.method, stack_on(architecture, settings, stack, gpu))
    method = METHODS[settings.method]
    tokens = settings.tokens
    peak = (gpu.bf16_tflops if settings.compute_bytes == 2 else gpu.fp32_tflops) * 1e12
    rate = peak * gpu.achievable * _STEP_EFFICIENCY * _fill(tokens, gpu)
    bandwidth = gpu.bandwidth_gb_s * 1e9 * _BANDWIDTH_SHARE
    forward, backward, recompute = _matmul_flops(architecture, settings, stack)
    attention = _attention_flops(architecture, min(mean_length or settings.sequence_length, settings.sequence_length))
    if settings.masked:  # a kernel that is given a mask computes the upper half too, and all documents of a row
        attention = 2 * _attention_flops(architecture, settings.sequence_length)
    passes = 3.5 + (1.0 if settings.checkpointing == "full" else 0.0)
    attention_rate = peak * _attention_share(gpu) * stack.attention_speed
    terms = {
        "forward": tokens * forward / rate,
        "backward": tokens * backward / rate,
        "recompute": tokens * recompute / rate,
        "attention": tokens * attention * passes / attention_rate,
        "elementwise": tokens * _elementwise_bytes(architecture, settings, stack) / bandwidth,
        "dequantize": _dequantize_bytes(architecture, settings, stack) / bandwidth,
        "launch": 0.0,
    }
    if method.forwards:  # over the same tokens, without gradients
        terms["reference"] = method.forwards * (terms["forward"] + terms["attention"] / passes)
    launches = _launches(architecture, settings)
    if gpu.kind == "cpu":  # nothing is launched ahead: each operation waits for the one before
        terms["launch"] = launches * _LAUNCH_CPU_S
    else:
        terms["launch"] = max(0.0, launches * _LAUNCH_S - sum(terms.values()))
    compute_s, backward_s = sum(terms.values()), terms["backward"]
    terms = {name: seconds * settings.accumulation for name, seconds in terms.items()}
    states = 1.0 if settings.offload == "none" else 0.0
    share = settings.sharing.share("optimizer", settings.world_size)
    terms["optimizer"] = states * share * _optimizer_bytes(architecture, settings, stack) / bandwidth
    terms["communication"] = _communication(architecture, settings, stack, gpu, compute_s, backward_s)
    if method.rollouts:
        terms["rollout"] = _rollout_s(architecture, settings, gpu)
    terms["offload"] = _offload_s(architecture, settings, gpu)
    step_s = sum(terms.values())
    world = settings.world_size
    per_step = tokens * settings.accumulation * useful
    model_flops = per_step * (forward + backward + 3 * attention)
    return Speed(
        tokens_per_s=per_step * world / step_s,
        step_s=step_s,
        mfu=model_flops / step_s / peak,
        terms=terms,
    )


def _attention_share(gpu: Gpu) -> float:
    """Share of the peak that FlashAttention-2 reaches over both passes (arXiv:2307.08691: 190 to 225 of 312 TFLOP/s on
    an A100; arXiv:2407.08608: 35% on an H100, whose asynchronous units it does not use)."""
    if gpu.kind == "cpu":
        return 0.4
    return {"8": 0.55, "9": 0.36, "1": 0.3}.get(gpu.compute_capability[:1], 0.4)


def _fill(tokens: int, gpu: Gpu) -> float:
    """How well a micro-batch of so many tokens fills the device."""
    half = _HALF_TOKENS * (gpu.bf16_tflops / 312) if gpu.kind == "cuda" else 16.0
    return tokens / (tokens + half)


@lru_cache(maxsize=4096)
def _flops(architecture: Architecture, tuning: str, rank: int, targets: str | tuple[str, ...]) -> tuple[float, float]:
    head = architecture.vocab * architecture.hidden
    weights = architecture.layer_matmul_weights + head
    if tuning == "full":
        return 2.0 * weights, 4.0 * weights
    pairs = architecture.lora_parameters(rank, targets)
    if architecture.adapted_experts:  # of the experts' pairs, a token passes the active ones
        pairs = min(pairs, weights)
    return 2.0 * (weights + pairs), 2.0 * weights + 4.0 * pairs


def _matmul_flops(architecture: Architecture, settings: Settings, stack: Stack) -> tuple[float, float, float]:
    """FLOPs per token of forward, backward and recomputation; the head is not checkpointed, but its tiles run twice."""
    forward, backward = _flops(architecture, settings.tuning, settings.rank, settings.targets)
    head = 2.0 * architecture.vocab * architecture.hidden
    again = forward - head if settings.checkpointing == "full" else 0.0
    if stack.whole_layers and again:  # a layer's gradients don't need its output
        again -= 2.0 * sum(layer.count * layer.mlp[-1].weight for layer in architecture.layers)
    return forward, backward, head + again


def _attention_flops(architecture: Architecture, span: float) -> float:
    """FLOPs per token of one causal forward over all layers: QK^T and its product with V."""
    width = architecture.heads * (architecture.head_dim + architecture.value_dim)
    local = min(span, architecture.window) if architecture.window else span
    full_layers = architecture.num_layers - architecture.windowed_layers
    return width * (span * full_layers + 2 * local * (1 - local / (2 * span)) * architecture.windowed_layers)


@lru_cache(maxsize=4096)
def _layer_bytes(architecture: Architecture, fused: bool) -> float:
    """Bytes per token that the elementwise kernels of one forward read and write, in 16 bits, over all layers.

    A norm in fp32 moves about 26 B per feature, a residual 6, rotary embedding 12 per query or key, a gated
    activation 10 per feature; fused kernels about half of it.
    """
    total = 0.0
    for layer in architecture.layers:
        norms, residuals = 26 * layer.norm_width, 12 * architecture.hidden
        rotary = 12 * (architecture.query_width + architecture.kv_width)
        gate = (10 if architecture.gated else 6) * layer.inner
        gather = 24 * architecture.hidden if layer.experts else 0
        total += layer.count * (norms + residuals + rotary + gate + gather)
    return total * (0.5 if fused else 1.0)


@lru_cache(maxsize=4096)
def _adapter_bytes(
    architecture: Architecture, targets: str | tuple[str, ...], width: int, autocast: bool, dropout: bool
) -> float:
    """Bytes per token of what PEFT adds in one forward: casts of the inputs, and adding the scaled result."""
    cast = (0.0 if width == 2 else 8.0 if autocast else 6.0) + (2 * width + 1 if dropout else 0)
    total = 0.0
    for layer, modules in architecture.targeted(targets):
        total += layer.count * sum(cast * module.d_in + 10 * module.d_out for module in modules)
    return total


def _elementwise_bytes(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    passes = 3.0 + (1.0 if settings.checkpointing == "full" else 0.0)  # a backward is about two forwards
    forward = _layer_bytes(architecture, stack.fused_norm or stack.whole_layers) * settings.compute_bytes / 2
    if settings.tuning != "full":
        width = settings.adapter_bytes(stack) if settings.compute_bytes == 2 and stack.casts_inputs else 2
        pairs = _adapter_bytes(architecture, settings.targets, width, stack.autocast, settings.dropout)
        forward += pairs * settings.compute_bytes / 2
    if settings.quantized and stack.kbit_upcast:
        forward *= 2  # the residual stream is fp32
    loss = 30 if stack.loss == "logits" else 8
    return passes * forward + loss * architecture.vocab


def _dequantize_bytes(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    if not settings.quantized:
        return 0.0
    uses = 2 + (1 if settings.checkpointing == "full" else 0)
    moved = QUANTIZED_BYTES[settings.quantization] + 2 * settings.compute_bytes
    if settings.quantization == "gptq" and not stack.unpacks_in_kernel:
        moved = _GPTQ_BYTES
    return uses * moved * architecture.linear_weights


def _launches(architecture: Architecture, settings: Settings) -> float:
    passes = 3.0 + (1.0 if settings.checkpointing == "full" else 0.0)
    modules = 0 if settings.tuning == "full" else sum(len(m) for _, m in architecture.targeted(settings.targets))
    per_layer = _KERNELS + _KERNELS_LORA * modules / max(len(architecture.layers), 1)
    if settings.quantized:
        per_layer += 14
    return passes * per_layer * architecture.num_layers


def _optimizer_bytes(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """Read and written by one step: weight, gradient and states, and once more the gradient for clipping."""
    if settings.tuning == "full":
        trained, width = architecture.parameters, settings.weight_bytes
    else:
        trained = architecture.lora_parameters(settings.rank, settings.targets)
        width = settings.adapter_bytes(stack)
    state = {"adamw": 4.0 * width, "adamw-8bit": 4.1, "paged-adamw-8bit": 4.1}.get(settings.optimizer, 0.1)
    return trained * (5 * width + state)


def _communication(
    architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, compute_s: float, backward_s: float
) -> float:
    """Seconds of one step that devices wait for each other, beside what they send while they compute.

    Args:
        compute_s: computing of one micro-batch.
        backward_s: of its backward.
    """
    world = settings.world_size
    if world < 2:
        return 0.0
    how, width = settings.sharing, settings.compute_bytes
    if settings.tuning == "full":
        gradients = float(architecture.parameters * (width if how.weights else settings.weight_bytes))
    else:
        pairs = architecture.lora_parameters(settings.rank, settings.targets)
        gradients = float(pairs * settings.adapter_bytes(stack))
    weights = float(width * architecture.parameters)
    if settings.quantized:
        packed = architecture.linear_weights
        weights = QUANTIZED_BYTES[settings.quantization] * packed + width * (architecture.parameters - packed)
    each, once = sent_bytes(how, world, weights=weights, gradients=gradients)
    link = _link(gpu)
    each /= _LIVE_SHARE if how.gathers == "live" else 1.0
    # Gathers run ahead of both passes, reductions behind backward; DDP's only behind the last micro-batch's.
    waits = max(_EXPOSED * each / link, each / link - _OVERLAP * compute_s) * settings.accumulation
    return waits + max(_EXPOSED * once / link, once / link - _OVERLAP * backward_s)


def _link(gpu: Gpu) -> float:
    """Bytes per second that a ring of all devices moves through each."""
    if gpu.kind == "cpu":
        return 2e9
    if gpu.link_gb_s:
        return gpu.link_gb_s * 1e9 * _LINK_SHARE
    # Consumer cards can't reach each other's memory: each byte is written to host memory and read again.
    staged = gpu.name.startswith(("RTX-30", "RTX-40", "RTX-50"))
    return gpu.pcie_gb_s * 1e9 * (_STAGED_SHARE if staged else _PCIE_SHARE)


def _offload_s(architecture: Architecture, settings: Settings, gpu: Gpu) -> float:
    """Seconds of one step that host memory costs: weights over PCIe for each pass, and Adam on the host."""
    if settings.offload == "none":
        return 0.0
    trained = architecture.trainable(settings.tuning, settings.rank, settings.targets) / settings.world_size
    bus = gpu.pcie_gb_s * 1e9 * _PCIE_SHARE
    adam = trained * 28 / _HOST_BYTES_S + trained * 6 / bus  # states and masters there, gradients and weights across
    if settings.offload == "optimizer":
        return adam
    moved = 2.0 * settings.compute_bytes * architecture.parameters / settings.world_size / bus
    return adam + max(_EXPOSED * moved, 0.5 * moved) * settings.accumulation


def _rollout_s(architecture: Architecture, settings: Settings, gpu: Gpu) -> float:
    """Seconds of generating the answers of one step with transformers: for each token all weights are read, and half of
    the cache on average; its kernels are launched one by one. vLLM is 5 to 10 times faster (published surveys).
    """
    bandwidth = gpu.bandwidth_gb_s * 1e9 * _BANDWIDTH_SHARE
    weights = 2.0 * architecture.parameters
    launch = _KERNELS * architecture.num_layers * (_LAUNCH_S if gpu.kind == "cuda" else _LAUNCH_CPU_S)
    each = max((weights + kv_cache_bytes(architecture, settings) / 2) / bandwidth, launch)
    return min(COMPLETION_TOKENS, settings.sequence_length // 2) * each
