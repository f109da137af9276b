"""Models whose layers are not all alike: recurrent layers between those with attention, and Gemma 4's.

Sources: ``modeling_qwen3_next.py``, ``modeling_qwen3_5.py`` and ``modeling_gemma4.py`` of transformers 5.23; gated
delta networks are those of Yang et al., arXiv:2412.06464.
"""

from __future__ import annotations

from collections import Counter

from .family import Config
from .layer import Layer, Linear

#: Without ``layer_types`` every so many layers attend (``full_attention_interval``).
_ATTENTION_EVERY = 4
#: Gemma 4: the head width of layers that attend to everything, and how often there is one.
_GLOBAL_HEAD_DIM, _GLOBAL_EVERY = 512, 6


def recurrent_layers(c: Config, total: int) -> list[bool]:
    """Which layers are gated delta networks."""
    kinds = c.get("layer_types")
    if isinstance(kinds, list):
        return [kind == "linear_attention" for kind in kinds[:total]]
    every = int(c.get("full_attention_interval") or _ATTENTION_EVERY)
    return [(i + 1) % every != 0 for i in range(total)]


def delta_net(c: Config, hidden: int) -> tuple[tuple[Linear, ...], int]:
    """The linear modules of a gated delta network, and its other parameters: convolution, decay, time step, norm."""
    key = c.whole("linear_key_head_dim") * c.whole("linear_num_key_heads")
    heads, head = c.whole("linear_num_value_heads"), c.whole("linear_value_head_dim")
    value = heads * head
    if c.family.delta_net == "fused":
        widths = {"in_proj_qkvz": 2 * key + 2 * value, "in_proj_ba": 2 * heads}
    else:
        widths = {"in_proj_qkv": 2 * key + value, "in_proj_z": value, "in_proj_b": heads, "in_proj_a": heads}
    into = tuple(Linear(name, hidden, width) for name, width in widths.items())
    convolution = (2 * key + value) * c.whole("linear_conv_kernel_dim")
    return (*into, Linear("out_proj", value, hidden)), convolution + 2 * heads + head


def gemma4_layers(c: Config, hidden: int, total: int) -> tuple[Layer, ...]:
    """Gemma 4: wider heads where attention is global, the last layers on keys and values of earlier ones, a gate for
    each layer's own embedding of the words, and experts beside the MLP."""
    kinds = c.get("layer_types")
    if not isinstance(kinds, list):
        kinds = ["sliding_attention" if (i + 1) % _GLOBAL_EVERY else "full_attention" for i in range(total)]
    kinds = [*kinds[: total - 1], "full_attention"]  # the last one always is
    first_shared = total - int(c.get("num_kv_shared_layers") or 0)
    counts = Counter((kind == "full_attention", i >= first_shared) for i, kind in enumerate(kinds))
    return tuple(_gemma4_layer(c, hidden, counts[key], *key) for key in counts)


def per_layer_embeddings(c: Config, hidden: int, total: int) -> tuple[int, tuple[Linear, ...], int]:
    """Gemma 4: parameters of the table of per-layer embeddings, the projection beside it, and its norm."""
    width = int(c.get("hidden_size_per_layer_input") or 0)
    if not c.family.shared_keys or not width:
        return 0, (), 0
    rows = c.whole("vocab_size_per_layer_input")
    return rows * total * width, (Linear("per_layer_model_projection", hidden, total * width),), width


def _gemma4_layer(c: Config, hidden: int, count: int, everywhere: bool, shared: bool) -> Layer:
    heads, kv, bias = c.whole("num_attention_heads"), c.whole("num_key_value_heads"), bool(c.get("attention_bias"))
    head = int(c.get("global_head_dim") or _GLOBAL_HEAD_DIM) if everywhere else c.whole("head_dim")
    same = bool(c.get("attention_k_eq_v")) and everywhere
    if same:
        kv = int(c.get("num_global_key_value_heads") or kv)
    attention = [Linear("q_proj", hidden, heads * head, bias)]
    if not shared:
        attention += [Linear("k_proj", hidden, kv * head, bias)]
        attention += [] if same else [Linear("v_proj", hidden, kv * head, bias)]
    attention.append(Linear("o_proj", heads * head, hidden, bias))
    inner = c.whole("intermediate_size") * (2 if c.get("use_double_wide_mlp") and shared else 1)
    mlp = [Linear("gate_proj", hidden, inner), Linear("up_proj", hidden, inner), Linear("down_proj", inner, hidden)]
    norms = 4
    if own := int(c.get("hidden_size_per_layer_input") or 0):
        mlp += [Linear("per_layer_input_gate", hidden, own), Linear("per_layer_projection", own, hidden)]
        norms += 1
    width = norms * hidden + (heads + (0 if shared else kv)) * head
    head_norms = head * (1 if shared else 2)
    if not c.get("enable_moe_block"):
        return Layer(count, tuple(attention), tuple(mlp), norms * hidden + head_norms, width, inner)
    experts, expert = c.whole("num_experts"), c.whole("moe_intermediate_size")
    active, each = min(c.whole("top_k_experts"), experts), 3 * hidden * expert
    mlp.insert(0, Linear("proj", hidden, experts))
    norms += 3
    return Layer(
        count, tuple(attention), tuple(mlp), norms * hidden + head_norms + hidden + experts, width + 3 * hidden,
        inner + active * expert, 0, experts, expert, experts * each, active * each,
    )  # fmt: skip
