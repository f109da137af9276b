"""Decoder layers of a loaded model, known by their parts: what makes one fit :mod:`.decoder_layer`, and its forward.

A layer is taken over if it is attention and a gated MLP around two residual sums, with norms before or after either,
whatever of it is trained. That it computes just this is found by running it: our function, the layer's own forward and
a float64 composition are held against each other (:mod:`.layerproof`) before the first layer of a kind is replaced.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import adapters, faster, glu, lora_glu, recognise, rotary, selfcheck
from . import decoder_layer as whole
from .attention import Documents, takes_documents
from .decoder_layer import Layer, Norms, Policy
from .fp8 import fp8_state
from .launch import unavailable
from .nf4 import nf4_state
from .projection import Projection
from .residual import Norm
from .rope import LAYOUTS, Layout

#: The norms that layers have by the names of their parts, and where each stands (:class:`.decoder_layer.Norms`).
_AROUND: tuple[dict[str, str], ...] = (
    {"input_layernorm": "before_attention", "post_attention_layernorm": "before_mlp"},
    {
        "input_layernorm": "before_attention", "post_attention_layernorm": "after_attention",
        "pre_feedforward_layernorm": "before_mlp", "post_feedforward_layernorm": "after_mlp",
    },
    {
        "input_layernorm": "before_attention", "post_self_attn_layernorm": "after_attention",
        "post_attention_layernorm": "before_mlp", "post_mlp_layernorm": "after_mlp",
    },
    {"post_attention_layernorm": "after_attention", "post_feedforward_layernorm": "after_mlp"},
)  # fmt: skip
_INNER: tuple[dict[str, str], ...] = (
    {"q_norm": "queries", "k_norm": "keys"}, {"query_layernorm": "queries", "key_layernorm": "keys"},
)  # fmt: skip
_QKV = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
#: What a model may hand its layers that does not change what they compute.
_IGNORED = {"position_ids", "cache_position", "num_items_in_batch", "output_attentions", "use_cache", "past_key_values"}


@dataclass(frozen=True)
class Found:
    """What a layer is, without its tensors.

    Args:
        mlp: the names of its parts; qkv: the names of attention's.
        norms: their forms, by where they stand; names: their own, and whether they are attention's, likewise.
        layout: of the rotary embedding; None if the layer does not use its tables.
        residual: what is added to the hidden states is multiplied by it.
        rotates_first: queries and keys are normed after the rotary embedding.
        last: no layer of the model runs after it.
    """

    mlp: recognise.GatedMLP
    norms: dict[str, recognise.Norm]
    names: dict[str, tuple[str, bool]]
    qkv: tuple[str, ...]
    layout: Layout | None
    policy: Policy
    residual: float = 1.0
    rotates_first: bool = False
    parks: bool = False
    last: bool = False


def ends_with_ours(backbone: Any, state: str) -> bool:
    """Whether the last layer that a model runs is one of ours, and known to be the last.

    Args:
        state: the attribute of a replaced module.
    """
    run = getattr(backbone, "layers", None)
    if not isinstance(run, nn.ModuleList) or not len(run):
        return False
    found = getattr(vars(run[-1]).get(state), "found", None)
    return isinstance(found, Found) and found.last


def looks_like_layer(module: nn.Module) -> bool:
    """Self-attention and something that acts as an MLP, whatever else."""
    return {"self_attn", "mlp"} <= {name for name, _ in module.named_children()}


def otherwise_built(module: nn.Module) -> str:
    """Where a layer has other parts than attention, a gated MLP and norms in known places; empty if nowhere."""
    if not _around(module):
        children, usual = set(_children(module)), {"self_attn", "mlp", *_AROUND[0]}
        if further := sorted(children - usual):
            return f"it has further parts ({', '.join(further)})"
        return f"it has no {', '.join(sorted(usual - children))}"
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if own:
        return f"it has tensors of its own ({', '.join(own)})"
    attention: Any = module.self_attn
    if not any(all(hasattr(attention, name) for name in (*names, "o_proj")) for names in _QKV):
        lacking = [name for name in (*_QKV[0], "o_proj") if not hasattr(attention, name)]
        return f"its attention has no {', '.join(lacking)}"
    return ""


def kind(module: Any) -> tuple[Any, ...]:
    """Layers of one kind have the same code and the same settings; what holds for one holds for all."""
    attention, mlp = module.self_attn, module.mlp
    settings = (
        attention.head_dim, getattr(attention, "scaling", None), getattr(attention, "attention_dropout", 0.0),
        *(
            (place, type(m), m.weight.shape, m.weight.dtype, m.weight.requires_grad, *recognise.settings(m))
            for place, m in norm_modules(module).items()
        ),
        recognise.settings(module), recognise.settings(attention),
    )  # fmt: skip
    linears = (*(getattr(attention, name) for name in (*qkv_names(attention), "o_proj")), *mlp.children())
    return (type(module), type(attention), type(mlp), settings, *(_signature(m) for m in linears))


def found(module: Any, dtype: torch.dtype, policy: Policy, *, parks: bool = False) -> Found | str:
    """What the layer is made of, or why it is left as it is."""
    attention, qkv = module.self_attn, qkv_names(module.self_attn)
    extra = set(_children(attention)) - {*qkv, "o_proj", *(name for names in _INNER for name in names)}
    if extra or any(True for _ in attention.parameters(recurse=False)):
        return f"its attention has further parts ({', '.join(sorted(extra)) or 'parameters'})"
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        return "its attention caps its scores, which no fused attention of torch does"
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", "sdpa")
    if implementation != "sdpa":
        return f"its attention is {implementation}, not sdpa"
    if not all(isinstance(getattr(attention, name, None), int | float) for name in ("head_dim", "scaling")):
        return "its attention has no head_dim and scaling"
    inner = next((names for names in _INNER if any(hasattr(attention, name) for name in names)), {})
    if not all(hasattr(attention, name) for name in inner):
        return "only one of queries and keys is normed"
    layout = rotary.layout(type(attention).forward)
    if layout not in LAYOUTS:
        return layout
    norms, modules = {}, norm_modules(module)
    for place, norm in modules.items():
        if not recognise.looks_like_norm(norm):
            return f"its {type(norm).__name__} is no RMSNorm"
        what = recognise.norm(norm)
        if isinstance(what, str):
            return what
        norms[place] = what
    widths = dict(zip(("queries", "keys"), _widths(attention), strict=True))
    for place in norms.keys() & widths.keys():
        if modules[place].weight.shape[0] not in (attention.head_dim, widths[place]):
            return f"its {place} are normed neither head by head nor all together"
    mlp = recognise.gated_mlp(module.mlp, dtype) if recognise.looks_like_gated_mlp(module.mlp) else "its MLP is no GLU"
    if isinstance(mlp, str):
        return mlp
    residual, first = getattr(module, "residual_multiplier", 1.0), _rotates_first(attention, inner)
    return Found(
        mlp, norms, _norm_names(module), qkv, layout, policy, residual=residual, rotates_first=first, parks=parks
    )


def build(module: Any, what: Found, x: torch.Tensor) -> tuple[Layer, list[torch.Tensor]] | str:
    """The layer as it stands now for an input like ``x``, and what of it is trained; or why it has to run by itself.

    The second as :func:`.decoder_layer.decoder_layer` takes it.
    """
    attention, mlp = module.self_attn, module.mlp
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if x.dtype != stream(module, dtype):
        return f"its input is {x.dtype} and computes in {dtype}"
    gate_up = [getattr(mlp, name) for name in (what.mlp.gate, what.mlp.up) if name]
    modules = [*(getattr(attention, name) for name in (*what.qkv, "o_proj")), *gate_up, getattr(mlp, what.mlp.down)]
    norms = {
        place: (attention if inner else module)._modules[name] for place, (name, inner) in what.names.items()
    }  # fmt: skip
    if adapters.hooked(attention, mlp, *modules, *norms.values()):
        return "something listens to its parts"
    if module.training and getattr(attention, "attention_dropout", 0.0):
        return "its attention has dropout"
    if module.training and any(child.p > 0 for child in module.children() if isinstance(child, nn.Dropout)):
        return "what it adds has dropout"
    projections, trained = [], [norm.weight for norm in norms.values() if norm.weight.requires_grad]
    for linear in modules:
        read = _projection(linear, x, dtype)
        if isinstance(read, str):
            return read
        projections.append(read[0])
        trained += read[1]
    made = {
        place: Norm(norm.weight, what.norms[place].eps, what.norms[place].form, norm.weight.requires_grad)
        for place, norm in norms.items()
    }
    number = len(what.qkv)
    pair = tuple(projections[number + 1 : -1])
    layer = Layer(
        Norms(**made), tuple(projections[:number]), projections[number], pair, projections[-1],
        int(attention.head_dim), float(attention.scaling), what.mlp.activation, what.layout, dtype,
        residual=what.residual, rotates_first=what.rotates_first, window=window(attention), policy=what.policy,
        parks=what.parks and x.is_cuda,
        fuses=_unit_pays(pair, dtype, x.device, what.mlp.activation),
    )  # fmt: skip
    return layer, trained


def stream(module: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the hidden states between layers that compute in ``dtype``: fp32 if their weights are."""
    weight = getattr(module.self_attn.o_proj, "weight", None)
    return torch.float32 if isinstance(weight, torch.Tensor) and weight.dtype == torch.float32 else dtype


def _unit_pays(
    gate_up: tuple[Projection, ...], dtype: torch.dtype, device: torch.device, activation: glu.Activation
) -> bool:
    if len(gate_up) == 1:
        return False
    gate, up = gate_up
    if not 0 < gate.rank == up.rank <= lora_glu.MAX_RANK:
        return False
    return faster.gated_unit(device, dtype, gate.out_features, gate.rank, activation).ok


def forward(self: Any, what: Found, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | str:
    """The layer's output by our function; or why its own forward has to run."""
    if len(args) != 1 or not isinstance(args[0], torch.Tensor) or args[0].dim() != 3:
        return "it was called with other than hidden states"
    x, mask, tables = args[0], kwargs.get("attention_mask"), kwargs.get("position_embeddings")
    if not isinstance(tables, tuple) or len(tables) != 2 or tables[0].shape[-1] > self.self_attn.head_dim:
        return "its rotary tables are wider than a head"
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 4):
        return f"its mask is a {type(mask).__name__}"
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache") or kwargs.get("output_attentions"):
        return "it was asked for a cache or for attention weights"
    documents = kwargs.get("documents")
    if documents is not None and not _documents_serve(self, x, documents):
        mask, documents = told_by_mask(self, x, kwargs), None
    rest = {name for name, value in kwargs.items() if value is not None} - _IGNORED
    if rest := rest - {"attention_mask", "position_embeddings", "documents", "needed"}:
        return f"it was given {', '.join(sorted(rest))}"
    if why := unavailable(x.device):
        return why
    built = build(self, what, x)
    if isinstance(built, str):
        return built
    if not _tables_serve(x.device, built[0].dtype, built[0].head_dim, tables[0].shape[-1], what.layout):
        return "its rotary embedding did not pass its check"
    needed = kwargs.get("needed") if what.last else None
    return whole.decoder_layer(x, tables, mask, *built, documents=documents, needed=needed)


def told_by_mask(self: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The mask of a call; made from its documents where the model was spared the making of one."""
    mask: torch.Tensor | None = kwargs.get("attention_mask")
    documents: Documents | None = kwargs.get("documents")
    if mask is not None or documents is None:
        return mask
    return documents.mask(x.shape[0], x.shape[1], window(self.self_attn))


def window(attention: Any) -> int | None:
    """How many positions a query sees, its own and those before; None if all.

    Some models keep the number with the layers that have a window, some with all layers, of which some say that they
    do not slide or are said not to, and some in the config alone.
    """
    config, place = getattr(attention, "config", None), getattr(attention, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or place is None or kinds[place] == "sliding_attention"
    if not slides or getattr(attention, "is_sliding", True) is False:
        return None
    of_all = getattr(config, "sliding_window", None)
    own: int | None = getattr(attention, "sliding_window", of_all)
    return own


def _documents_serve(self: Any, x: torch.Tensor, documents: Documents) -> bool:
    attention, dim, seen = self.self_attn, int(self.self_attn.head_dim), window(self.self_attn)
    if sum(documents.lengths) != x.shape[0] * x.shape[1] or not takes_documents(x, dim):
        return False
    queries, keys = _widths(attention)
    narrow = seen is not None and documents.longest > seen
    return _documents_proven(x.device, x.dtype, dim, queries // keys, narrow)


@functools.cache
def _documents_proven(device: torch.device, dtype: torch.dtype, dim: int, groups: int, narrow: bool) -> bool:
    return selfcheck.prove_documents(device, dtype, dim, groups, windowed=narrow).ok


@functools.cache
def _tables_serve(device: torch.device, dtype: torch.dtype, dim: int, width: int, layout: Layout | None) -> bool:
    """The layer's own proof was of tables as wide as a head."""
    return layout is None or width == dim or selfcheck.prove_rope(device, dtype, dim, width, layout).ok


def own_forward(self: Any, what: Found, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's own forward; checkpointed if little was to be kept, since the caller counts on that memory."""
    function = type(self).forward
    if what.policy == "all-but-elementwise" or not torch.is_grad_enabled() or kwargs.get("use_cache"):
        return function(self, *args, **kwargs)
    return checkpoint(function, self, *args, use_reentrant=False, **kwargs)


def norm_modules(module: Any) -> dict[str, Any]:
    """The norms of a layer by where they stand, in the order of :class:`.decoder_layer.Norms`."""
    attention = module.self_attn
    return {
        place: getattr(attention if inner else module, name) for place, (name, inner) in _norm_names(module).items()
    }


def _norm_names(module: Any) -> dict[str, tuple[str, bool]]:
    """The names of these norms, and whether they are attention's; the same of every layer that is built alike."""
    attention = module.self_attn
    inner = next((names for names in _INNER if all(hasattr(attention, name) for name in names)), {})
    around = {place: (name, False) for name, place in _around(module).items()}
    return around | {place: (name, True) for name, place in inner.items()}


def _children(module: nn.Module) -> list[str]:
    """The parts of a module that do something in every case."""
    return [name for name, child in module.named_children() if not isinstance(child, nn.Dropout)]


def _around(module: nn.Module) -> dict[str, str]:
    """The places of a layer's norms by their names; empty if these are not known."""
    names = set(_children(module)) - {"self_attn", "mlp"}
    return next((around for around in _AROUND if around.keys() == names), {})


def _rotates_first(attention: nn.Module, norms: dict[str, str]) -> bool:
    """Whether the code of an attention names the rotary embedding before it names its norms."""
    order = type(attention).forward.__code__.co_names
    return any(name in order and order.index(rotary._NAME) < order.index(name) for name in norms)


def qkv_names(attention: Any) -> tuple[str, ...]:
    """Of the projections to queries, keys and values, or of the one that makes all three."""
    return next(names for names in _QKV if all(hasattr(attention, name) for name in names))


def _widths(attention: Any) -> tuple[int, int]:
    """Of all queries and of all keys of a position."""
    queries, made = int(attention.o_proj.in_features), [getattr(attention, name) for name in qkv_names(attention)]
    return queries, int(made[1].out_features if made[1:] else (made[0].out_features - queries) // 2)


def _projection(module: Any, x: torch.Tensor, dtype: torch.dtype) -> tuple[Projection, list[torch.Tensor]] | str:
    if adapters.looks_like_lora(module):
        part = adapters.part(module, x.dtype, x.device)
        if isinstance(part, str):
            return part
        if isinstance(part.weight, torch.Tensor) and part.weight.dtype != dtype:
            return f"its weights are {part.weight.dtype} and compute in {dtype}"
        return Projection(part.weight, part.bias, part.a.shape[0], part.scaling), [part.a, part.b]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None:
        return "a projection is no linear layer"
    trained = weight.requires_grad
    if bias is not None and bias.requires_grad is not trained:
        return "a projection's weight and bias are not trained alike"
    if getattr(weight, "quant_state", None) is not None:
        state = nf4_state(weight)
        if isinstance(state, str):
            return state
        return (Projection(state, bias), []) if state.dtype == dtype else f"its weights were {state.dtype}"
    packed = fp8_state(module)
    if packed is not None:
        return Projection(packed, bias), []
    if type(module).forward is not nn.Linear.forward or weight.dtype != x.dtype or weight.device != x.device:
        return f"a projection is {type(module).__name__} in {weight.dtype}"
    if bias is not None and bias.dtype != weight.dtype:
        return f"a projection's bias is {bias.dtype}"
    own = [weight] if bias is None else [weight, bias]
    return Projection(weight, bias, trained=trained), own if trained else []


def _signature(module: Any) -> tuple[Any, ...]:
    """What makes one projection like another."""
    if not adapters.looks_like_lora(module):
        weight = getattr(module, "weight", None)
        known = [getattr(weight, name, None) for name in ("shape", "dtype", "requires_grad")]
        return (type(module), *known, getattr(module, "bias", None) is None)
    ranks = tuple((name, tuple(layer.weight.shape), module.scaling[name]) for name, layer in module.lora_A.items())
    return (type(module), *_signature(module.base_layer), ranks, adapters.obstacle(module))
