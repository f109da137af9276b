"""Reads a config.json into the fields of an Architecture, by the table of families or, failing that, by its shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from . import hybrid
from .errors import ModelError
from .families import FAMILIES
from .family import ALIASES, Config, Family, MoE
from .layer import Layer, Linear

#: Text towers whose config may leave out its own model_type.
_TEXT_TYPES = {
    "mistral3": "mistral",
    "llava": "llama",
    "llava_next": "llama",
    "paligemma": "gemma",
    "idefics3": "llama",
    "smolvlm": "llama",
    "internvl": "qwen2",
    "cohere2_vision": "cohere2",
    "aya_vision": "cohere2",
}
#: Models that hold every shape key of a decoder and yet can't be trained to continue text.
_NOT_DECODERS = {
    "albert", "bart", "bert", "bge", "blip", "camembert", "clip", "deberta", "deberta-v2", "distilbert", "electra",
    "ernie", "esm", "longformer", "longt5", "m2m_100", "marian", "mbart", "modernbert", "mpnet", "mt5", "nomic_bert",
    "pegasus", "roberta", "siglip", "speecht5", "switch_transformers", "t5", "umt5", "vit", "wav2vec2", "whisper",
    "xlm-roberta", "xlm-roberta-xl",
}  # fmt: skip
#: Keys for how many experts see every token.
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of an :class:`.architecture.Architecture` from a parsed config.json.

    Raises:
        ModelError: it is no decoder-only language model, or a shape is missing or wrong.
    """
    outer = config
    model_type = str(config.get("model_type", ""))
    inner = next((config[key] for key in ("text_config", "llm_config", "language_config") if key in config), None)
    if isinstance(inner, Mapping):
        named = f"{model_type}_text" if f"{model_type}_text" in FAMILIES else model_type
        model_type = str(inner.get("model_type") or _TEXT_TYPES.get(model_type, named))
        config = inner
    _refuse(config, outer, model_type, name)
    known = FAMILIES.get(model_type)
    c = Config(config, known or _guess(config), name)
    hidden, heads = c.whole("hidden_size"), c.whole("num_attention_heads")
    kv_heads = heads if c.family.plain_heads else _kv_heads(c, heads)
    head_dim = c.whole("head_dim") if c.get("head_dim") and not c.family.plain_heads else hidden // heads
    value_dim = head_dim
    if c.family.mla:
        head_dim, value_dim = c.whole("qk_nope_head_dim") + c.whole("qk_rope_head_dim"), c.whole("v_head_dim")
    # Of a vision-language model the whole decides, since the head belongs to it.
    tied = outer.get("tie_word_embeddings", c.get("tie_word_embeddings"))
    norm = {"rms": hidden, "layer": hidden * (1 + c.flag(c.family.norm_bias)), "fixed": 0}[c.family.norm]
    vocab = c.whole("vocab_size")
    positions = c.get("max_position_embeddings") or c.get("n_positions") or c.get("max_seq_len") or 0
    table = (positions + c.family.position_offset) * hidden if c.family.positions else 0
    window, windowed = _window(c)
    own, outside, own_norm = hybrid.per_layer_embeddings(c, hidden, c.whole("num_hidden_layers"))
    return {
        "name": name,
        "model_type": model_type,
        "family": known.title if known else model_type or "unknown",
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "vocab": vocab,
        "max_positions": int(positions),
        "tied": bool(tied),
        "layers": _layers(c, hidden, heads, kv_heads, head_dim, norm),
        "position_parameters": table + own,
        "final_norm": norm * (1 + c.family.embedding_norm) + own_norm,
        "outside": outside,
        "head_bias": vocab if c.flag(c.family.head_bias) else 0,
        "window": window,
        "windowed_layers": windowed,
        "layer_norm": c.family.norm != "rms",
        "gated": len(c.family.mlp) == 3 or c.family.fused_gate,
        "adapted_experts": c.family.moe.adapted if c.family.moe else (),
        "activation": _activation(config, model_type),
        "exact": known is not None,
        "note": ""
        if known
        else f"{model_type or 'no model_type'}: not known, so read by its shapes, as Llama-like layers",
    }


#: Where a config names none.
_ACTIVATIONS = {
    "gpt2": "gelu_new", "gptj": "gelu_new", "phi": "gelu_new", "gpt_neo": "gelu_new", "codegen": "gelu_new",
    "bloom": "gelu",
}  # fmt: skip


def _activation(config: Mapping[str, Any], model_type: str) -> str:
    """The MLP's activation by the names that configs have for it; else the default of its config class."""
    keys = ("hidden_activation", "hidden_act", "activation_function", "activation")
    named = next((config[key] for key in keys if isinstance(config.get(key), str)), "")
    return named or _ACTIVATIONS.get(model_type, "silu")


def _refuse(config: Mapping[str, Any], outer: Mapping[str, Any], model_type: str, name: str) -> None:
    """Raise for what can't be a decoder-only language model."""
    where = f"{name}: config.json"
    accepted = "finetui trains decoder-only language models, such as Llama, Qwen, Mistral or Gemma."
    if "_class_name" in outer or "_diffusers_version" in outer:
        raise ModelError("this is a diffusion model", where=where, do=accepted)
    masked = any(str(kind).endswith("ForMaskedLM") for kind in config.get("architectures") or ())
    if model_type in _NOT_DECODERS or config.get("is_encoder_decoder") or masked:
        raise ModelError(f"{model_type or 'this'} is no decoder-only language model", where=where, do=accepted)
    if model_type in FAMILIES:
        return
    missing = [key for key in _NEEDED if not any(alias in config for alias in ALIASES[key])]
    if missing:
        raise ModelError(
            f"no shape can be read: {', '.join(missing)} missing",
            where=where,
            do=f"{accepted} A config.json needs {', '.join(_NEEDED)}.",
        )


def _guess(config: Mapping[str, Any]) -> Family:
    """A family for an unknown model_type: Llama's names, a plain MLP where the activation is one."""
    activation = str(config.get("hidden_act") or config.get("activation_function") or "silu")
    plain = activation.startswith(("gelu", "relu")) and "intermediate_size" not in config
    mlp = ("up_proj", "down_proj") if plain else FAMILIES["llama"].mlp
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    moe = None
    if any(config.get(key) for key in counts):
        shared = next((key for key in _SHARED if config.get(key)), "")
        dense = any(config.get(key) for key in ALIASES["first_k_dense_replace"])
        moe = MoE(
            count=counts, sparse="first_dense" if dense else "step", shared="count" if shared else "",
            shared_count=shared,
        )  # fmt: skip
    return Family(
        "unknown", mlp=mlp, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias", moe=moe
    )


def _kv_heads(c: Config, heads: int) -> int:
    if c.get("multi_query") is not None:  # Falcon and GPT-BigCode
        if c.get("new_decoder_architecture"):
            return int(c.get("num_key_value_heads") or heads)
        return 1 if c.get("multi_query") else heads
    return int(c.get("num_key_value_heads") or heads)


def _window(c: Config) -> tuple[int, int]:
    """The attention window in tokens and the number of layers that keep to it."""
    layers, window = c.whole("num_hidden_layers"), c.get("sliding_window")
    if not isinstance(window, int) or window < 1 or not c.flag(c.family.window_if or True):
        return 0, 0
    kinds = c.get("layer_types")
    if isinstance(kinds, list):
        return window, sum(kind == "sliding_attention" for kind in kinds)
    every = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or c.family.window_every
    if not isinstance(every, int) or every < 1:
        return 0, 0
    return window, layers if every == 1 else layers - layers // every


def _layers(c: Config, hidden: int, heads: int, kv_heads: int, head_dim: int, norm: int) -> tuple[Layer, ...]:
    family = c.family
    total = c.whole("num_hidden_layers")
    if family.shared_keys:
        return hybrid.gemma4_layers(c, hidden, total)
    attention, extra = _attention(c, hidden, heads, kv_heads, head_dim)
    size, width = _norm_count(c) * norm, _norm_count(c) * hidden
    if family.qk_norm and c.flag(family.qk_norm_if or True):
        width += (heads + kv_heads) * head_dim
    inner = c.whole("intermediate_size") if c.get("intermediate_size") else 4 * hidden
    inner //= 1 + family.halved_inner
    if family.moe and family.moe.dense_width:
        inner = c.whole(family.moe.dense_width)
    recurrent = hybrid.recurrent_layers(c, total) if family.delta_net else [False] * total
    sparse = _sparse_layers(c, total) if family.moe else [False] * total
    counts = Counter(zip(sparse, recurrent, strict=True))
    kinds = []
    for routed, delta in sorted(counts):  # dense layers first
        parts, more = hybrid.delta_net(c, hidden) if delta else (attention, extra)
        norms, count = (size + more, width), counts[routed, delta]
        if routed:
            kinds.append(_moe_layer(c, count, parts, norms, hidden))
        else:
            kinds.append(Layer(count, parts, _mlp(c, hidden, inner), *norms, inner))
    return tuple(kinds)


def _norm_count(c: Config) -> int:
    if c.family.title == "Falcon":  # one norm per branch where attention and MLP run in parallel
        if c.get("new_decoder_architecture"):
            return int(c.get("num_ln_in_parallel_attn") or 2)
        return 1 if c.get("parallel_attn") else 2
    if c.family.title == "StableLM" and c.get("use_parallel_residual"):
        return 1
    return c.family.norms


def _attention(c: Config, hidden: int, heads: int, kv_heads: int, head_dim: int) -> tuple[tuple[Linear, ...], int]:
    """The linear modules of attention, and the parameters of its norms and sinks."""
    family = c.family
    bias, out_bias = c.flag(family.qkv_bias), c.flag(family.out_bias)
    if family.mla:
        return _latent_attention(c, hidden, heads, head_dim)
    q, kv = heads * head_dim, kv_heads * head_dim
    widths = (q * (1 + family.gated_query), kv, kv) if len(family.qkv) == 3 else (q + 2 * kv,)
    modules = tuple(Linear(name, hidden, width, bias) for name, width in zip(family.qkv, widths, strict=True))
    extra = (heads if family.sinks else 0) + family.activation_parameters
    if family.qk_norm and c.flag(family.qk_norm_if or True):
        bias_too = 2 if family.norm == "layer" and family.qk_norm == "dim" else 1
        extra += bias_too * {"dim": 2 * head_dim, "width": q + kv, "heads": q + kv}[family.qk_norm]
    return (*modules, Linear(family.out, q, hidden, out_bias)), extra


def _latent_attention(c: Config, hidden: int, heads: int, head_dim: int) -> tuple[tuple[Linear, ...], int]:
    """Queries and keys through a low-rank latent (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""
    bias = c.flag(c.family.qkv_bias)
    kv_rank, rope, nope, value = (
        c.whole(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    q_rank = c.get("q_lora_rank")
    if q_rank:
        queries = (Linear("q_a_proj", hidden, q_rank, bias), Linear("q_b_proj", q_rank, heads * head_dim))
    else:
        queries = (Linear("q_proj", hidden, heads * head_dim),)  # type: ignore[assignment]
    modules = (
        *queries,
        Linear("kv_a_proj_with_mqa", hidden, kv_rank + rope, bias),
        Linear("kv_b_proj", kv_rank, heads * (nope + value)),
        Linear("o_proj", heads * value, hidden, bias),
    )
    return modules, (q_rank or 0) + kv_rank


def _mlp(c: Config, hidden: int, inner: int) -> tuple[Linear, ...]:
    names, bias = c.family.mlp, c.flag(c.family.mlp_bias)
    if len(names) == 3:
        gate, up, down = names
        return (Linear(gate, hidden, inner, bias), Linear(up, hidden, inner, bias), Linear(down, inner, hidden, bias))
    up, down = names
    return (Linear(up, hidden, 2 * inner if c.family.fused_gate else inner, bias), Linear(down, inner, hidden, bias))


def _sparse_layers(c: Config, total: int) -> list[bool]:
    """Which layers have experts."""
    assert c.family.moe is not None
    rule = c.family.moe.sparse
    if rule == "step":
        step, dense = c.get("decoder_sparse_step") or 1, set(c.get("mlp_only_layers") or ())
        return [(i + 1) % step == 0 and i not in dense for i in range(total)]
    if rule == "first_dense":
        first = int(c.get("first_k_dense_replace") or 0)
        return [i >= first for i in range(total)]
    if rule == "interleave":
        chosen, step = c.get("moe_layers"), int(c.get("interleave_moe_layer_step") or 1)
        return [i in chosen if isinstance(chosen, list) else (i + 1) % step == 0 for i in range(total)]
    if rule == "types":
        kinds = c.get("mlp_layer_types")
        return (
            [kind == "sparse" for kind in kinds[:total]] if isinstance(kinds, list) else [i > 0 for i in range(total)]
        )
    return [True] * total


def _moe_layer(c: Config, count: int, attention: tuple[Linear, ...], norms: tuple[int, int], hidden: int) -> Layer:
    moe = c.family.moe
    assert moe is not None
    experts = next((c.whole(key) for key in moe.count if c.get(key) is not None), 0)
    width = next((c.whole(key) for key in moe.width if c.get(key) is not None), 0) or c.whole("intermediate_size")
    active = min(int(c.get("num_experts_per_tok") or 2), experts)
    each = 3 * hidden * width + (2 * width + hidden if moe.bias else 0)
    shared: tuple[Linear, ...] = ()
    inner = (experts if moe.everywhere else active) * width
    if moe.shared:
        size = c.whole("shared_expert_intermediate_size") if moe.shared == "size" else 0
        size = size or width * (1 if moe.shared == "one" else int(c.get(moe.shared_count) or 0))
        if size:
            shared = (
                Linear("gate_proj", hidden, size),
                Linear("up_proj", hidden, size),
                Linear("down_proj", size, hidden),
            )
            inner += size
        if moe.shared == "size":
            shared = (*shared, Linear("shared_expert_gate", hidden, 1))
    router = experts * hidden + (experts if moe.bias else 0)
    if moe.linear_router:
        shared, router = (Linear("router", hidden, experts), *shared), 0
    return Layer(
        count, attention, shared, *norms, inner, router, experts, width, experts * each, active * each, moe.everywhere
    )
