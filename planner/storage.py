"""What a model stores whatever the batch: weights, adapters, gradients, optimiser states, and copies of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .architecture import Architecture
from .options import LOW_RANK, OptimizerOptions
from .stacks import Stack

#: NF4, double quantisation: 4 bits, an 8-bit scale per 64 weights, an fp32 one per 256 of those (arXiv:2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
#: Bytes per quantised weight. NF4 as in QLoRA, and without the second quantisation of its scales; LLM.int8 with a scale
#: per row; GPTQ with a 16-bit scale and 4-bit zero per 128 weights.
QUANTIZED_BYTES = {"nf4": NF4_BYTES, "nf4-single": 0.5 + 4 / 64, "int8": 1.001, "gptq": 0.5 + 2.5 / 128, "fp8": 1.001}
#: 8-bit Adam: two bytes and two fp32 scales per 256 (bitsandbytes ``optimizer/functional``).
ADAM8_BYTES = 2 + 8 / 256
#: HF Trainer keeps fp32 states for embeddings under 8-bit Adam (transformers/trainer.py, GlobalOptimManager).
ADAM32_BYTES = 8.0


_USUAL = OptimizerOptions()


@dataclass(frozen=True)
class Fixed:
    """What does not depend on batch and sequence."""

    weights: float
    adapter: float
    gradients: float
    head_gradient: float
    optimizer: float
    optimizer_temporary: float
    layer_gradient: float
    trained: float
    """Parameters that are trained."""
    layer_bytes: float
    """The largest layer as it is stored."""
    weight_copies: float
    dequantized: float
    experts_merged: float
    unpacked_head: float = 0.0
    """A quantised head while the loss is made."""
    embedding_gradient: float = 0.0
    tied: bool = False
    packed_experts: float = 0.0
    """Quantised experts, which are parametrised tensors of three dimensions."""


@lru_cache(maxsize=4096)
def fixed_bytes(
    architecture: Architecture, tuning: str, rank: int, targets: str | tuple[str, ...], quantization: str, weight: int,
    compute: int, adapter: int, optimizer: str, stack: Stack, scalar_head: bool = False, counted: int | None = None,
    beside: float = 0.0, updates: OptimizerOptions = _USUAL, saved: int = 0,
) -> Fixed:  # fmt: skip
    head = architecture.vocab * architecture.hidden
    parameters, full = architecture.parameters, tuning == "full"
    parameters += head if stack.unties and architecture.tied else 0
    if scalar_head:  # one score per token in place of the words
        parameters += architecture.hidden - (0 if architecture.tied else head)
        head = architecture.hidden
    quantized, packed = 0, QUANTIZED_BYTES.get(quantization, 0.0)
    if packed:
        quantized = architecture.linear_weights + (architecture.expert_weights if stack.quantizes_experts else 0)
    unpacked_head = 0.0
    if packed and stack.quantizes_head:
        quantized += head
        unpacked_head = 2.0 * head
    other = 4 if packed and stack.kbit_upcast else weight
    weights = packed * quantized + other * (parameters - quantized)
    apart = packed and stack.quantizes_experts and not stack.linear_experts
    experts = architecture.expert_weights if apart else 0
    # bitsandbytes' parametrisation of them does not quantise the scales again.
    packed_experts = (QUANTIZED_BYTES["nf4-single"] if quantization == "nf4" else packed) * experts
    weights += packed_experts - packed * experts
    some = counted if counted is not None and counted != architecture.parameters else None  # freeze: not all of them
    pairs = 0 if full else architecture.lora_parameters(rank, targets) if counted is None else counted
    trained, width = (some or parameters, weight) if full else (pairs, adapter)
    largest = max(head, architecture.largest_linear) if full else rank * max(architecture.vocab, architecture.hidden)
    state, temporary = optimizer_bytes(optimizer, width)
    if optimizer in LOW_RANK and full:
        state = low_rank_bytes(architecture, optimizer, updates)
    series = width * trained if optimizer == "adamw" and not stack.fused_optimizer else 0
    states = state * trained
    # Modules that are trained whole keep the width of the base.
    kept = saved if not full and width > weight and not stack.saves_in_fp32 else 0
    narrower = (width - weight) * kept
    states -= (state - optimizer_bytes(optimizer, weight)[0]) * kept
    series -= narrower if series else 0
    if optimizer.endswith("8bit") and full and not optimizer.startswith("paged"):
        states += (ADAM32_BYTES - state) * head  # embeddings keep 32-bit states
    unpacked = quantization == "gptq" and not stack.unpacks_in_kernel
    merged = 0.0
    if pairs and architecture.adapted_experts:
        touched = [layer for layer in architecture.layers if architecture.expert_lora(layer, rank, targets)]
        # PEFT adds the pairs of all experts of a layer to a copy of their fused weights.
        merged = compute * max((layer.expert_weights for layer in touched), default=0)
    largest_layer = max(architecture.layers, key=lambda layer: layer.parameters)
    layer = largest_layer.parameters
    packable = 0
    if packed:
        packable = largest_layer.linear_weights + (largest_layer.expert_weights if stack.quantizes_experts else 0)
    return Fixed(
        weights=weights,
        adapter=pairs * adapter - narrower + beside,
        gradients=trained * width - narrower,
        head_gradient=head * width if full and not some else 0.0,
        optimizer=states,
        optimizer_temporary=temporary * largest + series,
        layer_gradient=layer * width if full else 0.0,
        trained=trained,
        layer_bytes=packed * packable + 2 * (layer - packable),
        # Autocast keeps a 16-bit copy of each fp32 weight for as long as forward runs.
        weight_copies=2.0 * _copied(architecture, stack, parameters, pairs, weight, compute, adapter, full=full),
        # GPTQ's weights pass through int32, twice, and through 8 and 16 bits on their way.
        # Experts are unpacked as a whole, and what a layer unpacked stays for its backward.
        dequantized=max(
            (12.0 if unpacked else 2.0) * architecture.largest_linear if packed else 0.0,
            2.0 * largest_layer.expert_weights if experts else 0.0,
        ),
        experts_merged=merged,
        embedding_gradient=architecture.vocab * architecture.hidden * width if full and not some else 0.0,
        tied=architecture.tied and not stack.unties,
        packed_experts=packed_experts,
        unpacked_head=unpacked_head,
    )


def _copied(
    architecture: Architecture, stack: Stack, parameters: int, pairs: int, weight: int, compute: int, adapter: int, *,
    full: bool,
) -> float:  # fmt: skip
    """Parameters of which autocast makes 16-bit copies: those of products, so of an embedding only where it is the head
    too; a loss that makes its own copy of the head counts it by itself."""
    if weight != 4 or compute != 2:
        return pairs if adapter == 4 and not full else 0.0
    table = architecture.vocab * architecture.hidden
    heads = 1 if stack.loss != "rows" else 0
    return parameters - table * (1 if architecture.tied else 2) + table * heads


def optimizer_bytes(name: str, width: int) -> tuple[float, float]:
    """State in bytes per parameter of ``width`` bytes, and temporaries in bytes per element of the largest tensor.

    Measured on torch 2.13 by tracing real steps; paged states live in host memory when the device runs short.
    """
    if name == "adamw":
        return 2.0 * width, 0.0
    if name == "adamw-8bit":
        return ADAM8_BYTES, 0.0
    if name == "adamw-4bit":  # two halves of a byte and two fp32 scales per 128 (torchao ``optim``, arXiv:2309.01507)
        return 1 + 8 / 128, 0.0
    if name.startswith("paged-"):
        return 0.0, 0.0
    if name == "lion-8bit":
        return 1 + 4 / 256, 0.0
    if name == "schedule-free":  # where averaging stands, and the second moment
        return 2.0 * width, 2.0 * width
    if name == "adopt":  # both moments in fp32, whatever the weights
        return 8.0, 16.0 if width == 2 else 4.0
    if name == "came":  # the first moment in fp32; the second, and that of residuals, by rows and columns
        return 4.01, 16.0 if width == 2 else 12.0
    if name == "adafactor":
        return 0.004, 20.0 if width == 2 else 12.0
    if name == "lion":
        return float(width), 2.0 * width
    if name == "muon":
        return float(width), 10.0 if width == 2 else 12.0
    return 0.0, 0.0  # sgd


def low_rank_bytes(architecture: Architecture, name: str, updates: OptimizerOptions) -> float:
    """State in bytes per parameter of GaLore and APOLLO on the whole model, in fp32.

    Of a matrix with sides s <= l, both moments are r x l; GaLore also keeps its projection, s x r (arXiv:2403.03507),
    where APOLLO draws its own from a seed (arXiv:2412.05270). All that is no matrix inside a layer gets AdamW's.
    """
    rank = 1 if name == "apollo-mini" else updates.projection_rank or 128
    total = 8.0 * (architecture.parameters - architecture.linear_weights)
    for layer in architecture.layers:
        for module in layer.linears:
            short, long = sorted((module.d_in, module.d_out))
            fitted = min(rank, short)
            total += 4.0 * layer.count * fitted * (2 * long + (short if name == "galore" else 0))
    return total / architecture.parameters
