"""Peak memory of one device, term by term, as the largest of three moments of a steady step.

    loss       all that forward kept, and the loss's own buffers
    backward   one layer at work, with what is still kept, and the gradients so far
    optimizer  all gradients, and the optimiser's temporaries

Adding the terms of all three, as most estimates do, counts memory that never lives at the same time: checkpoints are
freed layer by layer while gradients appear. What forward keeps per token and layer was measured on transformers'
Llama with saved-tensor hooks (bytes exact, two norms, SDPA, no mask)::

    full, bf16          16 H +  8 I + 4 q + 4 kv + 4 heads + 8
    full, mixed         26 H +  8 I + 4 q + 4 kv            (and a 16-bit copy of each weight)
    full, fp32          24 H + 16 I + 8 q + 8 kv
    frozen, bf16         8 H +  6 I + 4 q + 4 kv            and what its adapters keep:
    + LoRA, bf16        each distinct input once, 2 B, and 2 B x rank per module
    + LoRA, fp32        its own copy of the input per module: 2 B under autocast, 4 B without; 2 or 4 B x rank

with H hidden, I MLP width, q and kv the widths of queries and of keys or values. All results are bytes unless named
``gib``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .architecture import Architecture, Layer, Linear
from .hardware import GIB, Gpu
from .plan import Memory
from .stacks import Stack

#: NF4, double quantisation: 4 bits, an 8-bit scale per 64 weights, an fp32 one per 256 of those (arXiv:2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
#: 8-bit Adam: two bytes and two fp32 scales per 256 (bitsandbytes ``optimizer/functional``).
ADAM8_BYTES = 2 + 8 / 256
#: HF Trainer keeps fp32 states for embeddings under 8-bit Adam (transformers/trainer.py, GlobalOptimManager).
ADAM32_BYTES = 8.0
#: Bytes per logit of a tile in forward and backward where torch operations fold it instead of a Triton kernel: their
#: fp32 temporaries (measured with TRL 1.16 on the CPU).
_CPU_TILE = (29.0, 45.0)


@dataclass(frozen=True)
class Settings:
    """What of a plan decides over memory and speed. Widths, dtypes and names as in :class:`.plan.Resolved`."""

    tuning: Literal["full", "lora", "qlora"]
    sequence_length: int
    micro_batch: int = 1
    accumulation: int = 1
    rank: int = 16
    dropout: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    quantization: Literal["none", "nf4"] = "none"
    precision: Literal["bf16", "bf16-mixed", "fp16", "fp32"] = "bf16"
    optimizer: str = "adamw"
    checkpointing: Literal["none", "full"] = "full"
    attention: Literal["sdpa", "eager"] = "sdpa"
    world_size: int = 1
    masked: bool = False
    """Whether attention gets an explicit mask, as it does for padded and for packed rows under SDPA."""

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one device."""
        return self.micro_batch * self.sequence_length

    @property
    def weight_bytes(self) -> int:
        """Bytes per stored weight: mixed precision trains fp32 masters, a frozen base is stored as it computes."""
        if self.precision == "bf16" or (self.precision == "fp16" and self.tuning != "full"):
            return 2
        return 4

    @property
    def compute_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def adapter_bytes(self, stack: Stack) -> int:
        if self.precision in ("fp32", "fp16"):  # the gradient scaler of fp16 needs fp32 parameters
            return 4
        return stack.adapter_bytes_4bit if self.quantization == "nf4" else stack.adapter_bytes


@dataclass(frozen=True)
class _Fixed:
    """What does not depend on batch and sequence."""

    weights: float
    adapter: float
    gradients: float
    head_gradient: float
    optimizer: float
    optimizer_temporary: float
    layer_gradient: float
    weight_copies: float
    dequantized: float
    experts_merged: float


def peak_memory(architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu) -> Memory:
    """Predict the peak of one device of ``gpu``."""
    fixed = _fixed(architecture, settings, stack)
    moments = _moments(architecture, settings, stack, fixed, cpu=gpu.kind == "cpu")
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    terms = moments[moment]
    static = fixed.weights + fixed.adapter + fixed.optimizer
    allocated = static + sum(terms.values())
    slack = _slack(terms, moments["loss"]["logits"], stack, gpu)
    context = context_bytes(gpu, settings.world_size)
    device = allocated + slack + context
    parts = {
        "weights": fixed.weights,
        "adapter": fixed.adapter,
        "gradients": terms["gradients"],
        "optimizer": fixed.optimizer + terms["temporary"],
        "activations": terms["activations"],
        "logits": terms["logits"],
        "buffers": terms["buffers"] + slack,
        "context": context,
    }
    spread = 0.02 * static + 0.1 * (allocated - static) + 0.7 * slack + 0.3 * context
    return Memory(
        allocated_gib=allocated / GIB,
        reserved_gib=(allocated + slack) / GIB,
        device_gib=device / GIB,
        low_gib=max(device - spread, static) / GIB,
        high_gib=(device + spread) / GIB,
        terms={name: size / GIB for name, size in parts.items()},
        moment=moment,
        lever=_lever(moment, parts, settings),
    )


def _moments(
    architecture: Architecture, settings: Settings, stack: Stack, fixed: _Fixed, *, cpu: bool = False
) -> dict[Literal["loss", "backward", "optimizer"], dict[str, float]]:
    """Bytes beside the static ones at each of the three moments."""
    tokens, hidden = settings.tokens, architecture.hidden
    kept, transient = _activations(architecture, settings, stack)
    # Last hidden states, their norm's input in fp32 and the normalised copy, the embedding's output.
    tail = (10 if settings.compute_bytes == 2 else 16) * hidden * tokens
    held = fixed.gradients if settings.accumulation > 1 else 0.0  # gradients of earlier micro-batches
    forward, backward, head = _loss(architecture, settings, stack, fixed, cpu)
    copies = fixed.weight_copies
    buffers = fixed.dequantized + fixed.experts_merged + _mask(settings)
    if settings.world_size > 1:
        buffers += fixed.gradients  # DDP's buckets: one more copy of the gradients
    loss = {
        "activations": kept + tail,
        "gradients": held,
        "logits": max(forward, backward + head),
        "buffers": copies + _mask(settings) + (fixed.gradients if settings.world_size > 1 else 0.0),
        "temporary": 0.0,
    }
    first = kept + fixed.head_gradient + held  # the last layer's backward: everything is still kept
    last = max(fixed.gradients, held)  # the first layer's: all gradients are there
    if settings.tuning == "full" and settings.accumulation > 1:
        first += fixed.layer_gradient
        last += fixed.layer_gradient
    full_now = first >= last
    layers = {
        "activations": (kept if full_now else kept / max(architecture.num_layers, 1)) + transient,
        "gradients": first - kept if full_now else last,
        "logits": 0.0,
        "buffers": buffers + (copies if settings.checkpointing == "none" else copies / max(architecture.num_layers, 1)),
        "temporary": 0.0,
    }
    step = {
        "activations": 0.0,
        "gradients": fixed.gradients,
        "logits": 0.0,
        "buffers": fixed.gradients if settings.world_size > 1 else 0.0,
        "temporary": fixed.optimizer_temporary,
    }
    return {"loss": loss, "backward": layers, "optimizer": step}


@lru_cache(maxsize=4096)
def _fixed_cached(
    architecture: Architecture, tuning: str, rank: int, targets: str | tuple[str, ...], nf4: bool, weight: int,
    compute: int, adapter: int, optimizer: str, stack: Stack,
) -> _Fixed:  # fmt: skip
    parameters, full = architecture.parameters, tuning == "full"
    quantized = 0
    if nf4:
        quantized = architecture.linear_weights + (architecture.expert_weights if stack.quantizes_experts else 0)
    other = 4 if nf4 and stack.kbit_upcast else weight
    weights = NF4_BYTES * quantized + other * (parameters - quantized)
    pairs = 0 if full else architecture.lora_parameters(rank, targets)
    trained, width = (parameters, weight) if full else (pairs, adapter)
    head = architecture.vocab * architecture.hidden
    largest = max(head, architecture.largest_linear) if full else rank * max(architecture.vocab, architecture.hidden)
    state, temporary = optimizer_bytes(optimizer, width)
    series = width * trained if optimizer == "adamw" and not stack.fused_optimizer else 0
    states = state * trained
    if optimizer.endswith("8bit") and full and not optimizer.startswith("paged"):
        states += (ADAM32_BYTES - state) * head  # embeddings keep 32-bit states
    merged = 0.0
    if pairs and architecture.adapted_experts:
        touched = [layer for layer in architecture.layers if architecture.expert_lora(layer, rank, targets)]
        # PEFT adds the pairs of all experts of a layer to a copy of their fused weights.
        merged = 2.4 * compute * max((layer.expert_weights for layer in touched), default=0)
    layer = max(layer.parameters for layer in architecture.layers)
    return _Fixed(
        weights=weights,
        adapter=pairs * adapter,
        gradients=trained * width,
        head_gradient=head * width if full else 0.0,
        optimizer=states,
        optimizer_temporary=temporary * largest + series,
        layer_gradient=layer * width if full else 0.0,
        # Autocast keeps a 16-bit copy of each fp32 weight for as long as forward runs.
        weight_copies=2.0 * (parameters if weight == 4 and compute == 2 else pairs if adapter == 4 and not full else 0),
        dequantized=2.0 * architecture.largest_linear if nf4 else 0.0,
        experts_merged=merged,
    )


def _fixed(architecture: Architecture, settings: Settings, stack: Stack) -> _Fixed:
    return _fixed_cached(
        architecture, settings.tuning, settings.rank, settings.targets, settings.quantization == "nf4",
        settings.weight_bytes, settings.compute_bytes, settings.adapter_bytes(stack), settings.optimizer, stack,
    )  # fmt: skip


def optimizer_bytes(name: str, width: int) -> tuple[float, float]:
    """State in bytes per parameter of ``width`` bytes, and temporaries in bytes per element of the largest tensor.

    Measured on torch 2.13 by tracing real steps; paged states live in host memory when the device runs short.
    """
    if name == "adamw":
        return 2.0 * width, 0.0
    if name == "adamw-8bit":
        return ADAM8_BYTES, 0.0
    if name == "paged-adamw-8bit":
        return 0.0, 0.0
    if name == "adafactor":
        return 0.004, 20.0 if width == 2 else 12.0
    return 0.0, 0.0  # sgd


def _activations(architecture: Architecture, settings: Settings, stack: Stack) -> tuple[float, float]:
    """Bytes that forward keeps, and the further bytes of one layer's backward."""
    kept, work = activation_bytes(
        architecture, settings.tuning, settings.rank, settings.dropout, settings.targets, settings.precision,
        settings.adapter_bytes(stack), settings.attention == "eager", settings.masked, stack,
        settings.sequence_length if settings.attention == "eager" else 0,
    )  # fmt: skip
    tokens, copies = settings.tokens, _mask_copies(settings)
    if settings.checkpointing == "none":
        everything = sum(count * size for count, size, _ in kept) * tokens + copies * architecture.num_layers
        return everything, max(grow for _, _, grow in kept) * tokens
    residual = 4 if settings.weight_bytes == 4 or (settings.quantization == "nf4" and stack.kbit_upcast) else 2
    boundary = 0 if stack.offloads_checkpoints else residual * architecture.hidden * architecture.num_layers
    return boundary * tokens, work * tokens + copies


@lru_cache(maxsize=4096)
def activation_bytes(
    architecture: Architecture, tuning: str, rank: int, dropout: bool, targets: str | Sequence[str], precision: str,
    adapter: int, eager: bool, masked: bool, stack: Stack, sequence_length: int,
) -> tuple[list[tuple[int, float, float]], float]:  # fmt: skip
    """Bytes per token: (layers, kept by forward, more in backward) per kind of layer, and one layer's whole work."""
    c = 4.0 if precision == "fp32" else 2.0
    mixed = tuning == "full" and precision in ("bf16-mixed", "fp16")
    hidden, q, kv = architecture.hidden, architecture.query_width, architecture.kv_width
    value = architecture.heads * architecture.value_dim
    chosen = [modules for _, modules in architecture.targeted(targets)] if tuning != "full" else []
    kinds = []
    for number, layer in enumerate(architecture.layers):
        # Each norm keeps its input in fp32, and its normalised input where its weight is trained.
        norm = {True: 11.0 if mixed else 4.0 + c, False: 4.0}[tuning == "full"]
        if stack.fused_norm or architecture.layer_norm:
            norm = c
        attention = c * (q + value) + (2 * c * q if masked else c * 2 * kv) + 4 * architecture.heads
        if eager:
            attention += 8.0 * architecture.heads * sequence_length
        inner = layer.inner * c * (3 if architecture.gated else 1)
        if stack.fused_mlp:
            inner = layer.inner * c * (2 if architecture.gated else 1)
        routed = 4 * c * hidden * (layer.active_weights > 0) * 2
        size = norm * layer.norm_width + attention + inner + routed + 8
        if tuning == "full":
            size += c * (2 * hidden + layer.inner)
        else:
            size += _adapter_inputs(layer, chosen[number], rank, adapter, c, stack, dropout)
        grow = _backward_growth(tuning, hidden, layer.inner, adapter, c, stack)
        kinds.append((layer.count, size, grow))
    return kinds, max(size + grow for _, size, grow in kinds)


def _adapter_inputs(
    layer: Layer, modules: list[Linear], rank: int, adapter: int, c: float, stack: Stack, dropout: bool
) -> float:
    """Bytes per token that LoRA pairs keep: their inputs and the rank-wide product.

    A pair that casts its input, or drops some of it, keeps a copy of its own; dropout keeps its mask too, 1 B.
    """
    if not modules:
        return 0.0
    cast = adapter == 4 and c == 2 and stack.casts_inputs
    if dropout or cast:
        width = 4.0 if cast and not stack.autocast else c
        return sum((width + dropout) * module.d_in + width * rank for module in modules)
    names = {module.name for module in modules}
    queries = {m.name for m in layer.attention[:-1]}
    total = c * rank * len(modules)
    if names & queries:
        total += c * layer.attention[0].d_in
    into_mlp = {m.name for m in layer.mlp[:-1]}
    if names & into_mlp:
        total += c * layer.mlp[0].d_in
    if layer.mlp and layer.mlp[-1].name in names:
        total += c * layer.mlp[-1].d_in
    return total


def _backward_growth(tuning: str, hidden: int, inner: int, adapter: int, c: float, stack: Stack) -> float:
    """Bytes per token that one layer's backward needs beside what its forward kept (measured: allocation traces)."""
    if tuning == "full":
        return c / 2 * (10 * hidden + 7.6 * inner)
    if adapter == 4 and c == 2 and stack.casts_inputs:
        return (6 if stack.autocast else 12) * hidden + 4 * inner
    return c / 2 * (2 * hidden + 4 * inner)


def _loss(
    architecture: Architecture, settings: Settings, stack: Stack, fixed: _Fixed, cpu: bool
) -> tuple[float, float, float]:
    """Bytes of the loss in forward, in backward, and of the head's gradient while it is made."""
    vocab, hidden, tokens = architecture.vocab, architecture.hidden, settings.tokens
    c = settings.compute_bytes
    if stack.loss == "logits":
        return stack.logit_forward * vocab * tokens, stack.logit_backward * vocab * tokens, fixed.head_gradient
    if stack.loss == "tiles":
        tile = min(tokens, stack.chunk_tokens) * min(vocab, stack.tile_words)
        forward, backward = _CPU_TILE if cpu else (c, c)
        selected = c * hidden * tokens  # the hidden states of the trained positions, gathered
        head = (4 + settings.weight_bytes) * vocab * hidden if settings.tuning == "full" else 0.0
        return forward * tile + selected, backward * tile + selected + (4 + c) * hidden * tokens, head
    chunk = stack.chunk_tokens or _liger_chunk(tokens, vocab, hidden)
    logits = stack.logit_forward * vocab * chunk
    return logits, logits + c * hidden * tokens, fixed.head_gradient


def _liger_chunk(tokens: int, vocab: int, hidden: int) -> int:
    """Tokens per chunk of Liger's fused linear cross-entropy: next_pow2(T / ceil(V / H))."""
    return 1 << max(0, (max(1, -(-tokens // -(-vocab // hidden))) - 1).bit_length())


def _mask(settings: Settings) -> float:
    """Bytes of an explicit mask: one boolean per pair of positions."""
    return float(settings.micro_batch * settings.sequence_length**2) if settings.masked else 0.0


def _mask_copies(settings: Settings) -> float:
    """Bytes of the additive mask that each call of SDPA makes of the boolean one and keeps for its backward."""
    return settings.compute_bytes * _mask(settings)


def _slack(terms: dict[str, float], logits: float, stack: Stack, gpu: Gpu) -> float:
    """What the caching allocator holds beyond what is allocated: blocks that no later request fits.

    The blocks of a loss over all logits leave the largest gaps, whichever moment binds: runs on A100-80GB reserved 4 to
    8 GiB more than they allocated with one, and 1 to 2 GiB without.
    """
    if gpu.kind == "cpu":
        return 0.05 * sum(terms.values())
    moving = terms["activations"] + terms["buffers"] + terms["gradients"]
    share = 0.5 if stack.loss == "logits" else 0.1
    return 0.04 * moving + share * logits + 0.05 * GIB


def context_bytes(gpu: Gpu, world_size: int) -> float:
    """CUDA context with lazy kernels, cuBLAS workspaces, NCCL; on the CPU the interpreter with its libraries."""
    if gpu.kind == "cpu":
        return 0.9 * GIB
    hopper = gpu.compute_capability[:1] in ("9", "1")
    return (0.6 if hopper else 0.5) * GIB + (1.0 * GIB if world_size > 1 else 0.0)


def _lever(moment: str, parts: dict[str, float], settings: Settings) -> str:
    """The setting that lowers the peak most, in words."""
    largest = max(("weights", "gradients", "optimizer", "activations", "logits"), key=lambda name: parts[name])
    if largest == "activations" and settings.checkpointing == "none":
        return "hardware.checkpointing: full"
    if largest in ("activations", "logits"):
        return "micro_batch: 1" if settings.micro_batch > 1 else "a shorter sequence_length"
    if settings.tuning == "full":
        return "tuning: lora" if largest != "optimizer" else "optimizer.name: adamw-8bit"
    if settings.quantization == "none":
        return "tuning: qlora"
    return "a shorter sequence_length" if moment != "optimizer" else "a smaller model"
