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
from .fused import recomputed_weights, stack_on
from .hardware import Gpu
from .links import communication_s, offload_s, parking_s
from .memory import kv_cache_bytes
from .methods import METHODS, stack_for
from .plan import Speed
from .settings import Settings
from .stacks import Stack
from .traffic import KERNELS, dequantized_bytes, elementwise_bytes, launches, optimizer_launch_s, optimizer_traffic

#: What a training step gets of the best matrix product: shapes differ from the best one, and launches leave gaps.
#: Chosen so that llama-shaped 7B runs on A100-80GB at 16k tokens land on their measured 3,063 to 3,354 tokens/s.
STEP_EFFICIENCY = 0.86
#: The same where layers run as one function or are compiled: their pieces add up to a step's time (on an H200).
WHOLE_LAYERS_EFFICIENCY = 0.91
#: What the products of real layers reach of the best product there is (706 of 794 TFLOP/s on an H200).
LAYER_SHARE = 0.89
#: Rate of e4m3 products with a scale per row over bf16 ones (1,348 of 689 TFLOP/s on an H200), less their small parts.
FP8_GAIN = 1.85
#: Tokens at which matrix products reach half of that; smaller micro-batches can't fill the device.
_HALF_TOKENS = 160.0
#: Share of peak bandwidth that elementwise kernels see.
BANDWIDTH_SHARE = 0.8
#: FLOPs of exponentials and rescaling per FLOP of attention's products, at the peak of ordinary units.
_BESIDE = 0.0291
#: Where attention's instructions don't reach the matrix units' peak: what they reach over the peak of ordinary units.
_ISSUED = {"9": 5.88, "cudnn": 10.4, "10": 12.3}
#: Seconds from one kernel to the next under PyTorch eager where Python starts it: 25.5 tokens/s of a 7B model on an
#: A100, whose 32 layers of 38 operations each waited for the host
#: (pytorch.org/blog/accelerating-generative-ai-2); and where autograd does, from C++.
_LAUNCH_S, _LAUNCH_BACKWARD_S = 32e-6, 12e-6
#: The same of a layer that runs as one function, whose kernels Python starts one by one: 76 ms for a micro-batch of
#: 1,344 on an H200's host (``tests/bench/packed_runs.py``, rows of 200 tokens).
_LAUNCH_WHOLE_S = 5e-5
#: Seconds of ZeRO-3's own Python around each module of each pass, which fetches and releases its weights: full
#: fine-tuning of a 1.8B model took 260 to 275 ms a micro-batch on an A100 for 256 to 1,024 tokens alike (QwenLM/Qwen).
_HOOK_S = 3.5e-4
#: The same on a CPU, where each operation also starts and joins its threads.
_LAUNCH_CPU_S = 20e-6


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
        mean_length: tokens that attention spans, where that is less than the sequence length; a mask hides that from
            attention, unless layers run as one function.

    Returns:
        tokens/s over all devices, padding not counted; ``mfu`` is useful model FLOPs (6 N per token, 4 N frozen, no
        recomputation) over the device's peak.
    """
    settings = settings.under(stack)
    stack = stack_for(settings.method, stack_on(architecture, settings, stack, gpu))
    method = METHODS[settings.method]
    tokens = settings.tokens
    peak = (gpu.bf16_tflops if settings.compute_bytes == 2 else gpu.fp32_tflops) * 1e12
    efficiency = WHOLE_LAYERS_EFFICIENCY if stack.whole_layers or stack.compiled else STEP_EFFICIENCY
    rate = peak * gpu.achievable * efficiency * fill(tokens, gpu)
    bandwidth = gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE
    forward, backward, recompute = matmul_flops(architecture, settings, stack)
    in_8_bits = (settings.quantization == "fp8" or settings.fp8_products) and has_fp8(gpu)
    gain = FP8_GAIN if in_8_bits else 1.0
    span = min(mean_length or settings.sequence_length, settings.sequence_length)
    attention = attention_flops(architecture, span)
    within = settings.masked and stack.whole_layers  # these layers attend within documents, by flash attention
    if (
        settings.masked and not within
    ):  # a kernel that is given a mask computes the upper half too, and all documents of a row
        span, attention = settings.sequence_length, 2 * attention_flops(architecture, settings.sequence_length)
    # What is parked on the host has the attention's output with it, where layers run as one function.
    again = settings.recomputed(architecture.num_layers)
    attended = settings.keeps_outputs or (stack.whole_layers and settings.checkpointing == "offload")
    passes = 3.5 + (0.0 if attended else again)
    recent = stack.recent_attention and not within
    attention_rate = _attention_rate(gpu, span, architecture.head_dim, recent=recent) * stack.attention_speed
    attention_rate *= 1.0 if settings.compute_bytes == 2 else gpu.fp32_tflops / gpu.bf16_tflops
    terms = {
        "forward": tokens * shortened(forward, architecture, gain) / rate,
        "backward": tokens * shortened(backward, architecture, gain) / rate,
        "recompute": tokens * recompute / gain / rate,
        "attention": tokens * attention * passes / attention_rate,
        "elementwise": tokens * elementwise_bytes(architecture, settings, stack) / bandwidth,
        "dequantize": dequantized_bytes(architecture, settings, stack, in_8_bits=in_8_bits) / bandwidth,
        "launch": 0.0,
    }
    if settings.beside.forwards:  # over the same tokens, without gradients
        terms["reference"] = settings.beside.forwards * (terms["forward"] + terms["attention"] / passes)
    ahead, behind = launches(architecture, settings, stack)
    if gpu.kind == "cpu":  # nothing is launched ahead: each operation waits for the one before
        terms["launch"] = (ahead + behind) * _LAUNCH_CPU_S
    else:
        slower = gpu.launch_s / _LAUNCH_S if gpu.launch_s else 1.0
        host_s = slower * (ahead * _LAUNCH_S + behind * _LAUNCH_BACKWARD_S)
        if stack.whole_layers:  # Python starts backward's too
            host_s = (ahead + behind) * (gpu.launch_s or _LAUNCH_WHOLE_S)
        host_s = 0.0 if settings.graphs else host_s  # replayed, they are one
        if settings.sharing.gathers == "live":
            host_s += _hooks_s(architecture, settings)
        terms["launch"] = max(0.0, host_s - sum(terms.values()))
    if settings.checkpointing == "offload":
        forward_s = (sum(terms.values()) - terms["recompute"]) / 3
        terms["parking"] = parking_s(architecture, settings, stack, gpu, forward_s)
    # What is sent behind backward goes on while the device waits for the host.
    compute_s, backward_s = sum(terms.values()), terms["backward"] + terms["launch"]
    terms = {name: seconds * settings.accumulation for name, seconds in terms.items()}
    states = 1.0 if settings.offload == "none" else 0.0
    share = settings.sharing.share("optimizer", settings.world_size)
    update = optimizer_traffic(architecture, settings, stack) / bandwidth
    if gpu.kind == "cuda":
        update += optimizer_launch_s(architecture, settings, stack)
    terms["optimizer"] = states * share * update
    terms["communication"] = communication_s(architecture, settings, stack, gpu, compute_s, backward_s)
    if method.rollouts:
        terms["rollout"] = _rollout_s(architecture, settings, gpu)
    terms["offload"] = offload_s(architecture, settings, gpu)
    terms["launch"] += stack.waits_s if gpu.kind == "cuda" else 0.0
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


def _hooks_s(architecture: Architecture, settings: Settings) -> float:
    """Seconds of one micro-batch that ZeRO-3's hooks take on the host: of every module with weights, in every pass."""
    modules = sum(layer.count * (len(layer.linears) + 2) for layer in architecture.layers) + 3
    return _HOOK_S * modules * (2.0 + settings.recomputed(architecture.num_layers))


def _attention_rate(gpu: Gpu, span: float, head_dim: int, *, recent: bool) -> float:
    """FLOP/s that attention over ``span`` tokens reaches over both passes.

    Its products run on the matrix units, its exponentials and rescaling on the ordinary ones, one after the other for
    the most part: FlashAttention-2 on an A100 (arXiv:2307.08691, causal, 128 wide) reaches 133 TFLOP/s at 1k tokens,
    157 at 2k, 188 at 16k, where products alone reach 271 of 312. Consumer cards and the H20 have as many ordinary units
    beside matrix units of a fraction of the speed, so attention comes near to what products reach there. On Hopper
    FlashAttention-2 does not use the asynchronous units (arXiv:2407.08608: a third of the peak); cuDNN, which torch
    takes there from 2.9 on, does: 401 TFLOP/s at 2k tokens and 492 at 8k on an H200 (measured). Narrower heads do as
    much beside their products for fewer FLOPs: at 64, cuDNN reached 306 (16 layers of 8k tokens in 12.6 ms, measured),
    FlashAttention-2 nine tenths.
    """
    peak, narrow = gpu.bf16_tflops, min(head_dim / 128, 1.0)
    if gpu.kind == "cpu":
        return 0.4 * gpu.bf16_tflops * 1e12
    major = gpu.compute_capability.partition(".")[0]
    products = gpu.achievable * peak
    cudnn = major == "9" and recent
    if major in _ISSUED:
        products = min(products, _ISSUED["cudnn" if cudnn else major] * gpu.fp32_tflops)
    elif major not in ("8", "12"):  # older than FlashAttention-2, or another maker's
        return narrow**0.15 * 0.45 * peak * 1e12 * span / (span + 470)
    rate = 1 / (1 / products + _BESIDE / gpu.fp32_tflops)
    return rate * 1e12 * (narrow**0.4 * span / (span + 670) if cudnn else narrow**0.15 * span / (span + 470))


def has_fp8(gpu: Gpu) -> bool:
    """Whether its matrix units take e4m3: Ada, Hopper and later."""
    major, _, minor = gpu.compute_capability.partition(".")
    if gpu.kind != "cuda" or not major.isdigit():  # AMD's names (gfx942) have no such order
        return False
    return (int(major), int(minor or 0)) >= (8, 9)


def shortened(flops: float, architecture: Architecture, gain: float) -> float:
    """The FLOPs per token that take as long where all but the head's run ``gain`` times as fast."""
    head = min(2.0 * architecture.vocab * architecture.hidden, flops)
    return head + (flops - head) / gain


def fill(tokens: int, gpu: Gpu) -> float:
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


def matmul_flops(architecture: Architecture, settings: Settings, stack: Stack) -> tuple[float, float, float]:
    """FLOPs per token of forward, backward and recomputation; the head is not checkpointed, but its tiles run twice."""
    forward, backward = _flops(architecture, settings.tuning, settings.rank, settings.targets)
    head = 2.0 * architecture.vocab * architecture.hidden
    share = settings.recomputed(architecture.num_layers)
    again = share * (forward - head)
    if settings.keeps_outputs and again:
        spared = sum(layer.count * module.weight for layer in architecture.layers for module in layer.every_other)
        again -= share * 2.0 * spared
    if stack.whole_layers and again:  # a layer's gradients don't need its output, nor some products their own again
        policy = "offload" if settings.checkpointing == "offload" else "full"
        made_again = (layer.count * recomputed_weights(architecture, layer, policy) for layer in architecture.layers)
        again = share * 2.0 * sum(made_again)
    if stack.loss == "rows":  # its gradient is made with the loss
        head = 0.0
    return forward, backward, head + again


def attention_flops(architecture: Architecture, span: float) -> float:
    """FLOPs per token of one causal forward over all layers: QK^T and its product with V."""
    width = architecture.heads * (architecture.head_dim + architecture.value_dim)
    local = min(span, architecture.window) if architecture.window else span
    full_layers = architecture.num_layers - architecture.windowed_layers
    return width * (span * full_layers + 2 * local * (1 - local / (2 * span)) * architecture.windowed_layers)


def _rollout_s(architecture: Architecture, settings: Settings, gpu: Gpu) -> float:
    """Seconds of generating the answers of one step with transformers: for each token all weights are read, and half of
    the cache on average; its kernels are launched one by one. vLLM is 5 to 10 times faster (published surveys). The
    longest answer decides, since a batch ends together; several updates on the same answers share them.
    """
    bandwidth = gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE
    weights = 2.0 * architecture.parameters
    launch = KERNELS * architecture.num_layers * ((gpu.launch_s or _LAUNCH_S) if gpu.kind == "cuda" else _LAUNCH_CPU_S)
    each = max((weights + kv_cache_bytes(architecture, settings) / 2) / bandwidth, launch)
    return settings.beside.completion * each / settings.beside.updates
