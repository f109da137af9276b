"""What the kernels of a step read and write beside matrix products, and how many of them are launched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from .architecture import Architecture
from .fused import PIECE, layer_traffic
from .settings import Settings
from .stacks import Stack
from .storage import QUANTIZED_BYTES

#: Kernels of one eager layer's forward: norms, rotary, attention, MLP; and further ones for each LoRA pair. Operations
#: of transformers 5.23 and peft 0.21 under autocast, views left out: 38 forward and 71 backward, of a layer with seven
#: pairs 94 and 130.
KERNELS, _KERNELS_LORA = 40, 8
#: The same of compiled layers, whose elementwise operations are one kernel between two products.
_KERNELS_COMPILED, _KERNELS_COMPILED_LORA = 14, 2
#: Those of them that a fused kernel for each of two norms spares: squares, mean, root, two products and casts.
_KERNELS_NORMS = 10
#: The same of a layer that runs as one function, in forward, made again and in backward: 22, 12 and 35 with seven
#: pairs, 14, 9 and 23 without (``tests/bench/host_time.py``).
_WHOLE, _WHOLE_LORA = (14, 9, 23), (8 / 7, 3 / 7, 12 / 7)
#: What each further piece of the MLP's rows adds where layers compute again, in forward and in backward, and more for
#: each of its pairs; the gradients of trained weights are made in one piece.
_PIECES, _PIECES_LORA = (5, 9), (5 / 3, 14 / 3)
#: Series of small operations in fp32 and back reach three quarters of the speed of plain copies.
_EAGER = 1.3
#: Seconds in which bitsandbytes' 8-bit AdamW gets a tensor under way, one after the other (448 in 29 ms on an H200).
_TENSOR_S = 65e-6
#: Bytes that unpacking a GPTQ weight moves where it is trained on: shifts to int32, masks, casts and scales are torch
#: operations of their own (auto_gptq's trainable path).
_GPTQ_BYTES = 20.0


@lru_cache(maxsize=4096)
def layers_bytes(architecture: Architecture, fused: bool) -> float:
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
    return total * (0.5 if fused else _EAGER)


@lru_cache(maxsize=4096)
def _adapter_bytes(
    architecture: Architecture, targets: str | tuple[str, ...], width: int, autocast: bool, dropout: bool, once: bool
) -> tuple[float, float]:
    """Bytes per token of what PEFT adds in one forward: casts of the inputs, and adding the scaled result.

    Args:
        once: the result is added by the product that makes it.
    """
    each = (0.0 if width == 2 else 8.0 if autocast else 6.0) + (2 * width + 1 if dropout else 0)
    cast = added = 0.0
    for layer, modules in architecture.targeted(targets):
        cast += layer.count * sum(each * module.d_in for module in modules)
        added += layer.count * sum((4.0 if once else 10.0) * module.d_out for module in modules)
    return cast, added


def elementwise_bytes(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """Bytes per token of all layers and the loss, over all passes."""
    loss = 30.0 if stack.loss == "logits" else 8.0
    again = settings.recomputed(architecture.num_layers)
    if stack.whole_layers:
        policy = "offload" if settings.checkpointing == "offload" else "full"
        pairs = None if settings.tuning == "full" else settings.targets
        return _whole_layers_bytes(architecture, pairs, policy, again) + loss * architecture.vocab
    forward = layers_bytes(architecture, stack.fused_norm)
    added = 0.0
    if settings.tuning != "full":
        width = settings.adapter_bytes(stack) if settings.compute_bytes == 2 and stack.casts_inputs else 2
        cast, added = _adapter_bytes(
            architecture, settings.targets, width, stack.autocast, settings.dropout, stack.adds_in_product
        )
        forward += cast
    # A backward is about two forwards, but one of a sum, which only scales its gradient.
    moved = ((3.0 + again) * forward + (2.0 + again) * added) * settings.compute_bytes / 2
    if settings.quantized and stack.kbit_upcast:
        moved *= 2  # the residual stream is fp32
    return moved + loss * architecture.vocab


@lru_cache(maxsize=4096)
def _whole_layers_bytes(
    architecture: Architecture, targets: str | tuple[str, ...] | None, policy: str, again: float
) -> float:
    """``targets``: of adapters, None where there are none."""
    total = 0.0
    for layer, modules in architecture.targeted(targets or "all-linear"):
        moved = layer_traffic(architecture, layer, modules if targets else (), policy)
        total += layer.count * (moved.forward + moved.backward + again * moved.again)
    return total


def dequantized_bytes(
    architecture: Architecture, settings: Settings, stack: Stack, *, in_8_bits: bool = False
) -> float:
    """Bytes of all layers in one micro-batch: packed weights are read, and 16-bit ones written and read.

    Args:
        in_8_bits: products take the packed weights as they are; then it is what they multiply that is quantised, and
            weights are turned over for the gradients of inputs.
    """
    if not settings.quantized and not in_8_bits:
        return 0.0
    if in_8_bits:
        each = sum(
            layer.count * (3 * module.d_in + 3 * module.d_out)
            for layer in architecture.layers
            for module in layer.linears
        )
        return 2.0 * architecture.linear_weights + settings.tokens * each
    again = settings.recomputed(architecture.num_layers)
    weights = float(architecture.linear_weights)
    if stack.quantizes_experts:  # a micro-batch of some thousand tokens passes all of them
        weights += architecture.expert_weights
    moved = QUANTIZED_BYTES[settings.quantization] + 2 * settings.compute_bytes
    if settings.quantization == "gptq" and not stack.unpacks_in_kernel:
        moved = _GPTQ_BYTES
    if stack.whole_layers:  # backward unpacks the MLP's weights once, for what is made again and for gradients
        attention = sum(layer.count * module.weight for layer in architecture.layers for module in layer.attention)
        return moved * (2.0 * architecture.linear_weights + again * attention)
    return (2.0 + again) * moved * weights


@dataclass(frozen=True)
class Launches:
    """Kernels of one micro-batch: those of forward and those made again, which Python starts, and those of backward,
    which autograd does, but where layers run as one function."""

    forward: float
    again: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.again + self.backward


def launches(architecture: Architecture, settings: Settings, stack: Stack) -> Launches:
    """Kernels that one micro-batch launches in all layers."""
    adapted = 0 if settings.tuning == "full" else sum(len(m) for _, m in architecture.targeted(settings.targets))
    pairs, layers = adapted / max(len(architecture.layers), 1), architecture.num_layers
    again = layers * settings.recomputed(layers)
    if stack.whole_layers:
        return _whole_launches(architecture, settings, pairs)
    base, pair = (_KERNELS_COMPILED, _KERNELS_COMPILED_LORA) if stack.compiled else (KERNELS, _KERNELS_LORA)
    base -= _KERNELS_NORMS if stack.fused_norm and not stack.compiled else 0
    started = base + pair * pairs
    if settings.quantized:
        started += 2 if stack.compiled else 14
    # Frozen weights have no gradients to launch.
    behind = 2.0 if stack.compiled or settings.tuning == "full" else 1.5
    return Launches(layers * started, again * started, layers * behind * started)


def _whole_launches(architecture: Architecture, settings: Settings, pairs: float) -> Launches:
    """The same of layers that run as one function, of which each has so many pairs."""
    layers = architecture.num_layers
    again, unpacked = layers * settings.recomputed(layers), 2 if settings.quantized else 0
    forward, made_again, backward = (base + more * pairs for base, more in zip(_WHOLE, _WHOLE_LORA, strict=True))
    further = math.ceil(settings.tokens / PIECE) - 1
    inside = 0.0
    if settings.tuning != "full":
        targeted = architecture.targeted(settings.targets)
        inside = sum(module in layer.mlp for layer, modules in targeted for module in modules) / max(len(targeted), 1)
    ahead, behind = (base + more * inside for base, more in zip(_PIECES, _PIECES_LORA, strict=True))
    behind = 0.0 if settings.tuning == "full" else behind
    return Launches(
        layers * (forward + unpacked) + again * further * ahead,
        again * (made_again + unpacked + further * behind),
        layers * (backward + unpacked),
    )


def optimizer_traffic(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """Read and written by one step: weight, gradient and states, and once more the gradient for clipping."""
    if settings.tuning == "full":
        trained, width = architecture.parameters, settings.weight_bytes
    else:
        trained = architecture.lora_parameters(settings.rank, settings.targets)
        width = settings.adapter_bytes(stack)
    state = {"adamw": 4.0 * width, "adamw-8bit": 4.1, "paged-adamw-8bit": 4.1}.get(settings.optimizer, 0.1)
    return trained * (5 * width + state)


def optimizer_launch_s(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """Seconds of a step in which an 8-bit optimiser waits for its own launches, tensor by tensor.

    finetui takes a step over all tensors as over one (``kernels/adamw.py``).
    """
    if not settings.optimizer.endswith("8bit") or stack.flat_optimizer:
        return 0.0
    if settings.tuning == "full":
        tensors = sum(layer.count * (len(layer.linears) + 2) for layer in architecture.layers)
    else:
        tensors = sum(layer.count * 2 * len(modules) for layer, modules in architecture.targeted(settings.targets))
    return tensors * _TENSOR_S
