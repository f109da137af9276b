"""Family: how transformers builds one decoder layer of a model_type, as a row of a table.

A row holds the names of a layer's linear modules, where its biases and norms are, and the values that transformers
takes for keys a config leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ModelError

#: Keys that hold the same figure under the names that different families gave it.
ALIASES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": (
        "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length",
    ),
    "head_dim": ("head_dim", "kv_channels"),
    "first_k_dense_replace": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "num_experts_per_tok": ("num_experts_per_tok", "num_experts_per_token", "moe_k"),
}  # fmt: skip
#: A fixed answer, or the config key that holds it.
Flag = bool | str


@dataclass(frozen=True)
class MoE:
    """Where a config says how its experts are laid out.

    ``sparse`` names the rule for which layers have experts: ``all``; ``step`` (every ``decoder_sparse_step``-th layer
    but those in ``mlp_only_layers``); ``first_dense`` (all after the first ``first_k_dense_replace``); ``types``
    (``mlp_layer_types``, or all but the first); ``interleave`` (``moe_layers``, or every
    ``interleave_moe_layer_step``-th). Experts and routers are plain parameters, not ``nn.Linear``:
    neither bitsandbytes nor ``all-linear`` sees them.
    """

    count: tuple[str, ...] = ("num_local_experts", "num_experts")
    width: tuple[str, ...] = ("moe_intermediate_size",)
    sparse: Literal["all", "step", "first_dense", "types", "interleave"] = "all"
    shared: Literal["", "count", "size", "one"] = ""
    """Shared experts: ``count`` x width (``n_shared_experts``), one of ``shared_expert_intermediate_size``, or ``one``
    as wide as the others."""
    shared_count: str = "n_shared_experts"
    dense_width: str = ""
    """Config key of the MLP width of the layers without experts, where it is not ``intermediate_size``."""
    linear_router: bool = False
    """The router is an ``nn.Linear``, which ``all-linear`` and bitsandbytes do see."""
    bias: bool = False
    """Router and experts have biases."""
    everywhere: bool = False
    """Every expert runs over every token, weighed by a score that is 0 where it was not chosen (``Llama4TextMoe``)."""
    adapted: tuple[str, ...] = ()
    """What PEFT's targets call router, gate, up and down projection where it puts LoRA on fused experts too
    (``_MOE_TARGET_MODULE_MAPPING`` in peft/utils/transformers_weight_conversion.py, 0.21); then dense and shared MLPs
    get none."""


@dataclass(frozen=True)
class Family:
    """One row: how a layer of this ``model_type`` is built."""

    title: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """The input projections of attention: three names, or one that holds all three."""
    out: str = "o_proj"
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Three names: gated. Two names: plain, or gated with the first fused when ``fused_gate``."""
    fused_gate: bool = False
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    norms: int = 2
    """Norms of the hidden size in one layer."""
    norm: Literal["rms", "layer", "fixed"] = "rms"
    """``rms`` has a weight, ``layer`` a weight and a bias, ``fixed`` nothing to train."""
    norm_bias: Flag = True
    """Whether a ``layer`` norm has its bias."""
    qk_norm: Literal["", "dim", "width", "heads"] = ""
    """Norms on queries and keys: one head wide, the whole projection wide, or one per head."""
    qk_norm_if: str = ""
    """The config key that turns ``qk_norm`` on; empty: always."""
    embedding_norm: bool = False
    """What the embedding gives is normed too."""
    halved_inner: bool = False
    """``intermediate_size`` counts gate and up projection together."""
    sinks: bool = False
    activation_parameters: int = 0
    """Trained numbers of the activation of one MLP."""
    head_bias: Flag = False
    positions: str = ""
    """Config key of a learned position table."""
    position_offset: int = 0
    plain_heads: bool = False
    """As many key as query heads, each hidden / heads wide, whatever the config says."""
    mla: bool = False
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""
    moe: MoE | None = None
    gated_query: bool = False
    """The query projection is twice as wide: its other half gates what attention answers."""
    delta_net: Literal["", "fused", "split"] = ""
    """Layers of another kind between those with attention (:func:`.hybrid.delta_net`), and how their input
    projections are laid out."""
    shared_keys: bool = False
    """Gemma 4, whose layers are not alike (:func:`.hybrid.gemma4_layers`)."""
    window_every: int = 0
    """Without ``layer_types``, all but every n-th layer attend within ``sliding_window``; 1: all of them do."""
    window_if: str = ""


def shape_defaults(
    vocab: int, hidden: int, inner: int | None, layers: int, heads: int, kv: int | None = None, **more: Any
) -> dict[str, Any]:
    """The keys of a config under their usual names."""
    shape = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**shape, "num_attention_heads": heads, "num_key_value_heads": kv, **more}


#: Figures above these are mistakes or worse: layers are counted one by one, and shapes multiply. Of the models that
#: are told, the largest have a hundredth of each.
MOST = {
    "num_hidden_layers": 10_000, "hidden_size": 2**20, "intermediate_size": 2**24, "num_attention_heads": 2**16,
    "vocab_size": 2**26,
}  # fmt: skip
_LARGEST = 2**31


class Config:
    """A config.json with the defaults of its family behind it."""

    def __init__(self, config: Mapping[str, Any], family: Family, name: str) -> None:
        self.config, self.family, self.name = config, family, name

    def get(self, key: str) -> Any:
        for alias in ALIASES.get(key, (key,)):
            if alias in self.config:
                return self.config[alias]
        return self.family.defaults.get(key)

    def whole(self, key: str) -> int:
        value = self.get(key)
        where = f"{self.name}: config.json"
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            what = f"{key} must be a whole number above 0, not {str(value)[:60]!r}"
            raise ModelError(what, where=where, do="Fetch the model again, or mend its config.json.")
        if value > MOST.get(key, _LARGEST):
            what = f"{key} is larger than that of any model"
            raise ModelError(what, where=where, do="Fetch the model again, or mend its config.json.")
        return value

    def flag(self, flag: Flag) -> bool:
        return bool(self.get(flag)) if isinstance(flag, str) else flag
