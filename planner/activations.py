"""What forward keeps for backward, per token and layer, and what one layer's backward needs beside it.

Measured on transformers' Llama with saved-tensor hooks (bytes exact, two norms, SDPA, no mask)::

    full, bf16          16 H +  8 I + 4 q + 4 kv + 4 heads + 8
    full, mixed         26 H +  8 I + 4 q + 4 kv            (and a 16-bit copy of each weight)
    full, fp32          24 H + 16 I + 8 q + 8 kv
    frozen, bf16         8 H +  6 I + 4 q + 4 kv            and what its adapters keep:
    + LoRA, bf16        each distinct input once, 2 B, and 2 B x rank per module
    + LoRA, fp32        its own copy of the input per module: 2 B under autocast, 4 B without; 2 or 4 B x rank

with H hidden, I MLP width, q and kv the widths of queries and of keys or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from .adapters import KEPT
from .architecture import Architecture
from .layer import Layer, Linear
from .stacks import Stack


@lru_cache(maxsize=4096)
def activation_bytes(
    architecture: Architecture, tuning: str, rank: int, dropout: bool, targets: str | Sequence[str], precision: str,
    adapter: int, eager: bool, masked: bool, stack: Stack, sequence_length: int, packed: bool = False,
    dora: bool = False, kind: str = "",
) -> tuple[list[tuple[int, float, float]], float]:  # fmt: skip
    """Bytes per token: (layers, kept by forward, more in backward) per kind of layer, and one layer's whole work."""
    c = 4.0 if precision == "fp32" else 2.0
    mixed = tuning == "full" and precision in ("bf16-mixed", "fp16")
    hidden, q, kv = architecture.hidden, architecture.query_width, architecture.kv_width
    value = architecture.heads * architecture.value_dim
    chosen = [modules for _, modules in architecture.targeted(targets)] if tuning != "full" else []
    sinks = eager and architecture.model_type == "gpt_oss"  # its softmax takes one more column
    casts = adapter == 4 and c == 2 and stack.casts_inputs  # each pair then keeps a copy of its own
    kinds = []
    for number, layer in enumerate(architecture.layers):
        # Each norm keeps its input in fp32, and its normalised input where its weight is trained.
        norm = {True: 11.0 if mixed else 4.0 + c, False: 4.0}[tuning == "full"]
        if architecture.layer_norm:  # autocast runs it in fp32
            cast = stack.autocast and c == 2 and (tuning != "full" or mixed) and not stack.fused_norm
            norm = 4.0 if cast else c
        elif stack.fused_norm:
            norm = 4.0 if mixed else c
        # With a mask, keys and values are repeated for each head that shares them; a single one needs no copy.
        repeated = q if masked and architecture.kv_heads > 1 else kv
        attention = c * (q + value) + 2 * c * repeated + 4 * architecture.heads
        if stack.fused_qkv and kv < q:  # keys and values are copied for each head that shares them
            attention = c * (3 * q + value) + 4 * architecture.heads
        elif stack.fused_qkv or len(layer.attention) == 2:  # values are a view of the projection's whole output
            attention += c * (q + kv)
        if eager:  # softmax, in fp32 and in 16 bits, and a soft cap's tanh; keys and values copied for every head
            # Beside sinks the softmax is in 16 bits, and all that stays but for where each row has its maximum.
            scores = 2.0 if sinks else 8.0 if architecture.model_type == "gemma2" else 6.0
            attention += architecture.heads * (scores * sequence_length + (8 if sinks else 0)) + 2 * c * (q - repeated)
            if tuning != "full" and (casts or layer.attention[-1] not in chosen[number]):
                attention -= c * value  # a plain product does not keep what it gives
        after = (layer.attention[-1], *layer.mlp)
        routed_width = round(layer.experts_per_token * layer.expert_width)
        dense = layer.inner - routed_width
        inner = dense * c * _mlp_tensors(architecture, stack, c, tuning == "full" and not mixed)
        trained = tuning == "full" or architecture.expert_lora(layer, 1, targets) > 0
        routed = _routed(architecture, layer, c, stack, trained=trained, counted=tuning == "full")
        size = norm * layer.norm_width + attention + inner + routed + 8
        if packed and stack.keeps_packed_inputs:
            normed = min(2, layer.norm_width // hidden) * hidden  # one where attention and MLP share their norm
            size += c * stack.keeps_packed_inputs * (normed + layer.inner) + c * (stack.keeps_packed_inputs - 1) * q
        if tuning == "full":
            size += c * (2 * hidden + layer.inner)
            if mixed and stack.fused_norm and not architecture.layer_norm:
                size += 3 * c * hidden  # what the norm answers in fp32 is cast for each of five products by itself
        else:
            if kind in KEPT:
                norms = kind in ("norms", "adapter-v2")  # whose weights are trained
                size += KEPT[kind].per_token(chosen[number]) + (c * layer.norm_width if norms else 0.0)
            else:
                size += _adapter_inputs(layer, chosen[number], rank, adapter, c, stack, dropout)
                if kind == "adalora":  # what its singular values scaled is divided by their number
                    size += (c if stack.autocast else adapter) * sum(module.d_out for module in chosen[number])
            # DoRA keeps its scaled output and that of base and pair (measured with saved-tensor hooks).
            size += dora * 3 * c * sum(module.d_out for module in chosen[number])
        at_once = layer.inner
        if stack.linear_experts and layer.experts:  # one expert after the other, each over its share of the rows
            at_once = dense + round(routed_width / layer.experts)
        grow = _backward_growth(tuning, hidden, at_once, adapter, c, stack)
        if eager:
            # The MLP is done with by then. Gradients of what softmax gave and took, in fp32, less the 16-bit copy that
            # is gone; beside sinks, in 16 bits, of softmax, of the same with its sink, of what it was taken of, of the
            # maximum and of their sum. And of the layer's output, of the sum before its MLP and of the experts' rows.
            late = [] if kind in KEPT or tuning == "full" else [m for m in chosen[number] if m in after]
            done = inner + routed + norm * layer.norm_width / 2
            done += _adapter_inputs(layer, late, rank, adapter, c, stack, dropout)
            attending = (10.0 if sinks else 6.0) * architecture.heads * sequence_length
            attending += (4 + c * layer.experts_per_token) * hidden
            grow = max(grow, attending - done)
        kinds.append((layer.count, size, grow))
    return kinds, max(size + grow for _, size, grow in kinds)


def _routed(architecture: Architecture, layer: Layer, c: float, stack: Stack, *, trained: bool, counted: bool) -> float:
    """Bytes per token that routed experts keep: they run over rows sorted by expert, one row per token and expert.

    Args:
        trained: they have gradients, so the inputs of both products are kept.
        counted: the input of the second is counted by whoever asks.
    """
    if not layer.experts:
        return 0.0
    gated = 2.0 if stack.fused_experts else 3.0
    wide = (6.0 if architecture.model_type == "gpt_oss" else gated) + (trained and not counted)
    rows = layer.experts_per_token * (layer.expert_width * wide + architecture.hidden * (1 + trained))
    return c * rows + 4 * layer.experts  # and the router's softmax, in fp32


def _mlp_tensors(architecture: Architecture, stack: Stack, c: float, plain: bool) -> float:
    """Tensors as wide as the MLP that it keeps, its last input not among them, in units of ``c`` bytes.

    Args:
        plain: nothing is cast on the way.
    """
    if (
        architecture.activation == "gelu_new" and stack.stock_model
    ):  # written out: input, cube, sums and tanh, in fp32 under autocast
        return 8.0 if stack.autocast and c == 2 and not plain else 5.0
    if architecture.model_type == "gpt_oss":  # gate and up in one, clamped, a sigmoid, and two products
        return 7.0
    if not architecture.gated:
        return 1.0
    return 2.0 if stack.fused_mlp else 3.0


def _adapter_inputs(
    layer: Layer, modules: list[Linear], rank: int, adapter: int, c: float, stack: Stack, dropout: bool
) -> float:
    """Bytes per token that LoRA pairs keep: their inputs and the rank-wide product.

    A pair that casts its input, or drops some of it, keeps a copy of its own; dropout keeps its mask too, 1 B.
    """
    if not modules:
        return 0.0
    cast = adapter == 4 and c == 2 and stack.casts_inputs
    if stack.merges_pairs:
        fused = [module for module in modules if module in layer.attention[:-1]]
        merged = c * sum(module.d_out for module in fused) if len(fused) < len(layer.attention) - 1 else 0.0
    else:
        merged = 0.0
    if dropout or cast:
        width = 4.0 if cast and not stack.autocast else c
        if stack.fused_qkv:  # one pair of pairs on one input
            modules = modules[:1] + [m for m in modules[1:] if m not in layer.attention[:-1]]
        return merged + sum((width + dropout) * module.d_in + width * rank for module in modules)
    names = {module.name for module in modules}
    queries = {m.name for m in layer.attention[:-1]}
    total = c * rank * len(modules)
    if names & queries:
        total += c * layer.attention[0].d_in
    into_mlp = {m.name for m in layer.mlp[:-1]}
    if names & into_mlp:
        total += c * layer.mlp[0].d_in
    if layer.mlp and layer.mlp[-1].name in names and not (stack.remakes_activation and not layer.experts):
        total += c * layer.mlp[-1].d_in
    return total


def _backward_growth(tuning: str, hidden: int, inner: int, adapter: int, c: float, stack: Stack) -> float:
    """Bytes per token that one layer's backward needs beside what its forward kept (measured: allocation traces)."""
    if tuning == "full":
        return c / 2 * (8 * hidden + 4 * inner if stack.fused_mlp else 10 * hidden + 7.6 * inner)
    if adapter == 4 and c == 2 and stack.casts_inputs:
        return 8.0 * hidden + 6 * inner if stack.autocast else 12.0 * hidden + 4 * inner
    return c / 2 * (2 * hidden + 4 * inner)
