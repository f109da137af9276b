"""What a model stores whatever the batch: weights, adapters, gradients, optimiser states, and copies of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .architecture import Architecture
from .stacks import Stack

#: NF4, double quantisation: 4 bits, an 8-bit scale per 64 weights, an fp32 one per 256 of those (arXiv:2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
#: Bytes per quantised weight. NF4 as in QLoRA, and without the second quantisation of its scales; LLM.int8 with a scale
#: per row; GPTQ with a 16-bit scale and 4-bit zero per 128 weights.
QUANTIZED_BYTES = {"nf4": NF4_BYTES, "nf4-single": 0.5 + 4 / 64, "int8": 1.001, "gptq": 0.5 + 2.5 / 128}
#: 8-bit Adam: two bytes and two fp32 scales per 256 (bitsandbytes ``optimizer/functional``).
ADAM8_BYTES = 2 + 8 / 256
#: HF Trainer keeps fp32 states for embeddings under 8-bit Adam (transformers/trainer.py, GlobalOptimManager).
ADAM32_BYTES = 8.0


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


@lru_cache(maxsize=4096)
def fixed_bytes(
    architecture: Architecture, tuning: str, rank: int, targets: str | tuple[str, ...], quantization: str, weight: int,
    compute: int, adapter: int, optimizer: str, stack: Stack, scalar_head: bool = False,
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
    other = 4 if packed and stack.kbit_upcast else weight
    weights = packed * quantized + other * (parameters - quantized)
    pairs = 0 if full else architecture.lora_parameters(rank, targets)
    trained, width = (parameters, weight) if full else (pairs, adapter)
    largest = max(head, architecture.largest_linear) if full else rank * max(architecture.vocab, architecture.hidden)
    state, temporary = optimizer_bytes(optimizer, width)
    series = width * trained if optimizer == "adamw" and not stack.fused_optimizer else 0
    states = state * trained
    if optimizer.endswith("8bit") and full and not optimizer.startswith("paged"):
        states += (ADAM32_BYTES - state) * head  # embeddings keep 32-bit states
    unpacked = quantization == "gptq" and not stack.unpacks_in_kernel
    merged = 0.0
    if pairs and architecture.adapted_experts:
        touched = [layer for layer in architecture.layers if architecture.expert_lora(layer, rank, targets)]
        # PEFT adds the pairs of all experts of a layer to a copy of their fused weights.
        merged = 2.4 * compute * max((layer.expert_weights for layer in touched), default=0)
    largest_layer = max(architecture.layers, key=lambda layer: layer.parameters)
    layer = largest_layer.parameters
    packable = 0
    if packed:
        packable = largest_layer.linear_weights + (largest_layer.expert_weights if stack.quantizes_experts else 0)
    return Fixed(
        weights=weights,
        adapter=pairs * adapter,
        gradients=trained * width,
        head_gradient=head * width if full else 0.0,
        optimizer=states,
        optimizer_temporary=temporary * largest + series,
        layer_gradient=layer * width if full else 0.0,
        trained=trained,
        layer_bytes=packed * packable + 2 * (layer - packable),
        # Autocast keeps a 16-bit copy of each fp32 weight for as long as forward runs.
        weight_copies=2.0 * (parameters if weight == 4 and compute == 2 else pairs if adapter == 4 and not full else 0),
        # GPTQ's weights pass through int32, twice, and through 8 and 16 bits on their way.
        dequantized=(12.0 if unpacked else 2.0) * architecture.largest_linear if packed else 0.0,
        experts_merged=merged,
    )


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
    if name == "lion":
        return float(width), 2.0 * width
    if name == "muon":
        return float(width), 10.0 if width == 2 else 12.0
    return 0.0, 0.0  # sgd
