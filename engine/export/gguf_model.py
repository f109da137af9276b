"""How llama.cpp knows a model: its architecture, the metadata that it reads, and the order of rows that it expects.

A GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) holds numbers and no code: llama.cpp has a
program of its own for each architecture. Some numbers it reads, others it has written down, as which layers of Gemma
slide. What a config says otherwise than that program would make a file that loads and talks nonsense, so it is refused.
Names of tensors come from the package ``gguf``; what each program reads from llama.cpp's ``src/models``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...planner.errors import ModelError

#: What to do with a model that no one here can write.
ELSEWHERE = (
    "Use: finetui export RUN --to merged, then llama.cpp's convert_hf_to_gguf.py on that folder; "
    "it knows more architectures."
)
Metadata = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model_type of transformers as llama.cpp has it.

    Args:
        arch: the name of its program in llama.cpp.
        interleaved: it turns neighbouring numbers of a head (2i, 2i + 1) together, where transformers turns the two
            halves (i, i + d/2): the rows of q and k are put into that order.
        norm_offset: added to the weights of norms, where transformers computes with 1 + weight.
        activation: of its MLP.
        tied: the head is always the embedding.
        square: the heads together are as wide as the model; it knows no other size of head.
        more: what else it reads, from the config.
    """

    arch: str
    interleaved: bool = False
    norm_offset: float = 0.0
    activation: tuple[str, ...] = ("silu",)
    tied: bool = False
    square: bool = False
    more: Callable[[Any], Metadata] = lambda config: {}


@dataclass(frozen=True)
class GgufModel:
    """One model: metadata without those of its tokenizer, and how its tensors are named and written.

    ``extra`` are tensors that no checkpoint holds; ``notes`` say where llama.cpp computes otherwise than training did.
    """

    family: Family
    config: Any
    metadata: Metadata
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def name(self, stored: str) -> str | None:
        """The name in the file of a tensor of the checkpoint; None for one that is not written.

        Raises:
            ModelError: llama.cpp's program has no place for it.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        plain = _text_part(stored)
        if plain is None or plain.endswith("rotary_emb.inv_freq"):
            return None
        if plain == "lm_head.weight" and getattr(self.config, "tie_word_embeddings", False):
            return None
        arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == self.family.arch), None)
        if arch is None:
            what = f"the installed package gguf does not know {self.family.arch}"
            raise ModelError(what, where=str(self.config.model_type), do="Update it: pip install -U 'finetui[export]'")
        names = get_tensor_name_map(arch, int(self.config.num_hidden_layers))
        found = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None:
            what = f"llama.cpp's {self.family.arch} has no place for the tensor {stored}"
            raise ModelError(what, where=str(self.config.model_type), do=ELSEWHERE)
        return found

    def rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the file by its name there, as llama.cpp expects its values."""
        kind = name.split(".")[2] if name.startswith("blk.") else name
        if self.family.interleaved and kind in ("attn_q", "attn_k"):
            heads = self.config.num_attention_heads if kind == "attn_q" else _kv_heads(self.config)
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            return halves.transpose(1, 2).reshape(tensor.shape)
        if self.family.norm_offset and name.endswith("norm.weight"):
            return tensor.float() + self.family.norm_offset
        return tensor


def describe(config: Any) -> GgufModel:
    """What to write for a model.

    Args:
        config: of transformers; of a model that also sees images, its text part is taken.

    Raises:
        ModelError: llama.cpp, or this module, can't compute what the model does; ``do`` says what can be done.
    """
    config = config.get_text_config()
    kind = str(config.model_type)
    family = family_of(kind)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    if activation not in family.activation:
        raise _otherwise(kind, f"its activation is {activation}", f"computes {family.activation[0]}")
    if family.tied and not config.tie_word_embeddings:
        raise _otherwise(kind, "its head is not its embedding", "has one matrix for both")
    head = _head_dim(config)
    if family.square and head * config.num_attention_heads != config.hidden_size:
        raise _otherwise(kind, f"its heads are {head} wide", "takes hidden_size over the number of heads")
    notes: list[str] = []
    rope, extra = _rope(config, notes)
    reach = _window(config)
    if family.arch not in ("gemma2", "gemma3") and reach:
        notes.append(
            f"llama.cpp attends to the whole context in every layer, where this model saw {reach} tokens in some: "
            f"answers may differ beyond {reach} tokens"
        )
    metadata: Metadata = {
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": _kv_heads(config),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": int(config.vocab_size),
        **rope,
        **family.more(config),
    }
    return GgufModel(family, config, metadata, extra, tuple(notes))


def family_of(kind: str) -> Family:
    """What is known of a model_type.

    Raises:
        ModelError: nothing.
    """
    if kind not in FAMILIES:
        known = ", ".join(name for name in FAMILIES if not name.endswith("_text"))
        what = f"no GGUF can be written here for the architecture {kind} (there are: {known})"
        raise ModelError(what, where=kind, do=ELSEWHERE)
    return FAMILIES[kind]


def _otherwise(kind: str, model: str, program: str) -> ModelError:
    return ModelError(f"{model}, but llama.cpp's program {program}", where=kind, do=ELSEWHERE)


def _text_part(name: str) -> str | None:
    """The name of a tensor in the text model alone; None for what sees images."""
    if "vision" in name or "multi_modal_projector" in name:
        return None
    name = name.removeprefix("model.language_model.").removeprefix("language_model.")
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _window(config: Any) -> int:
    """How many tokens a layer that slides sees; 0 where that is no limit."""
    size = int(getattr(config, "sliding_window", None) or 0)
    layers = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layers if layers else getattr(config, "use_sliding_window", True)
    return size if slides and 0 < size < config.max_position_embeddings else 0


def _rope(config: Any, notes: list[str]) -> tuple[Metadata, dict[str, torch.Tensor]]:
    """The metadata and tensors of rotary embeddings (Su et al. 2021, arXiv:2104.09864) and their scaling."""
    parameters: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    sliding = parameters.get("sliding_attention")
    parameters = dict(parameters.get("full_attention", parameters))
    head, context = _head_dim(config), int(config.max_position_embeddings)
    turned = int(head * float(parameters.get("partial_rotary_factor") or 1.0))
    metadata: Metadata = {
        "rope.freq_base": float(parameters.get("rope_theta", 10000.0)),
        "rope.dimension_count": turned,
    }
    if sliding is not None:
        if sliding.get("rope_type", "default") != "default":
            raise _otherwise(config.model_type, "its sliding layers scale their rope", "scales none of them")
        metadata["rope.freq_base_swa"] = float(sliding.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return metadata, {}
    if kind == "linear":
        factor = float(parameters["factor"])
        return metadata | {"rope.scaling.type": "linear", "rope.scaling.factor": factor}, {}
    original = int(parameters.get("original_max_position_embeddings") or context)
    if kind == "llama3":
        return metadata, {"rope_freqs.weight": _llama3_factors(config, metadata, turned)}
    if kind == "yarn":
        return metadata | _yarn(config, parameters, original), {}
    if kind == "longrope":
        return _longrope(config, parameters, metadata, original, turned, notes)
    raise _otherwise(config.model_type, f"it scales its rope the {kind} way", "does not")


def _llama3_factors(config: Any, metadata: Metadata, turned: int) -> torch.Tensor:
    """By how much each frequency is divided, which is all that llama.cpp knows of Llama 3's scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = metadata["rope.freq_base"] ** -(torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    return (plain / scaled.double()).float()


def _yarn(config: Any, parameters: dict[str, Any], original: int) -> Metadata:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), whose attention factor llama.cpp takes to be 0.1 ln(factor) + 1."""
    factor = float(parameters["factor"])
    usual = 0.1 * math.log(factor) + 1.0
    asked = parameters.get("attention_factor")
    if parameters.get("mscale") or parameters.get("mscale_all_dim") or parameters.get("truncate") is False:
        raise _otherwise(config.model_type, "its YaRN has settings of its own", "has the usual ones")
    if asked is not None and not math.isclose(float(asked), usual, rel_tol=1e-4):
        raise _otherwise(config.model_type, f"its YaRN scales attention by {asked}", f"scales it by {usual:.4g}")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": float(parameters.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(parameters.get("beta_slow") or 1.0),
    }


def _longrope(
    config: Any, parameters: dict[str, Any], metadata: Metadata, original: int, turned: int, notes: list[str]
) -> tuple[Metadata, dict[str, torch.Tensor]]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): one set of factors for short contexts, one for long ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.model_type != "phi3":
        raise _otherwise(config.model_type, "it scales its rope the longrope way", "does not")
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    extra = {
        f"rope_factors_{which}.weight": torch.tensor(parameters[f"{which}_factor"], dtype=torch.float32)
        for which in ("long", "short")
    }
    assert all(len(factors) == turned // 2 for factors in extra.values())
    notes.append(f"llama.cpp takes its factors for long texts as soon as its context is set beyond {original} tokens")
    scaling = {"rope.scaling.attn_factor": float(attention), "rope.scaling.original_context_length": original}
    return metadata | scaling, extra


# --- what single families have beside the common


def _gemma2(config: Any) -> Metadata:
    _gemma_scale(config, 46)
    _every(config, 2)
    caps = {
        "attn_logit_softcapping": float(config.attn_logit_softcapping or 0.0),
        "final_logit_softcapping": float(config.final_logit_softcapping or 0.0),
    }
    if not all(caps.values()):
        raise _otherwise("gemma2", "its logits are not capped", "caps them")
    return {**caps, "attention.sliding_window": int(config.sliding_window)}


def _gemma3(config: Any) -> Metadata:
    _gemma_scale(config, 62)
    _every(config, 6)
    if getattr(config, "attn_logit_softcapping", None):
        raise _otherwise("gemma3", "its attention is capped", "does not cap it")
    cap = getattr(config, "final_logit_softcapping", None)
    more = {"final_logit_softcapping": float(cap)} if cap else {}
    return {**more, "attention.sliding_window": int(config.sliding_window)}


def _gemma_scale(config: Any, largest: int) -> None:
    """llama.cpp scales attention by the head's size, and by hidden size over heads in the largest model alone."""
    layers, size = config.num_hidden_layers, _head_dim(config)
    expected = config.hidden_size // config.num_attention_heads if layers == largest else size
    if config.query_pre_attn_scalar != expected:
        model = f"its attention is scaled by 1 / sqrt({config.query_pre_attn_scalar})"
        raise _otherwise(config.model_type, model, f"scales it by 1 / sqrt({expected})")


def _every(config: Any, period: int) -> None:
    """llama.cpp has it written down that each ``period``-th layer attends to everything."""
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(config.layer_types))]
    if list(config.layer_types) != kinds:
        raise _otherwise(config.model_type, "its layers slide in another order", f"slides in all but each {period}th")


def _smollm3(config: Any) -> Metadata:
    usual = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != usual:
        raise _otherwise("smollm3", "other layers are without rope", "has none in each 4th")
    return {}


def _granite(config: Any) -> Metadata:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _phi3(config: Any) -> Metadata:
    return {"attention.sliding_window": 0}  # llama.cpp has no sliding layers for it; 0 also tells Phi-4 from Phi-3


_GELU = ("gelu_pytorch_tanh", "gelu_tanh", "gelu")
_gemma3_family = Family("gemma3", norm_offset=1.0, activation=_GELU[:2], more=_gemma3)
#: By model_type.
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2", square=True),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norm_offset=1.0, activation=_GELU, tied=True),
    "gemma2": Family("gemma2", norm_offset=1.0, activation=_GELU[:2], tied=True, more=_gemma2),
    "gemma3": _gemma3_family,
    "gemma3_text": _gemma3_family,
    "phi3": Family("phi3", square=True, more=_phi3),
    "olmo2": Family("olmo2", square=True),
    "smollm3": Family("smollm3", interleaved=True, more=_smollm3),
    "granite": Family("granite", interleaved=True, square=True, more=_granite),
}
