"""Decoder layers of a loaded model, known by their parts: what makes one fit :mod:`.decoder_layer`, and its forward.

A layer is taken over if it is norm, attention with rotary embedding, norm and gated MLP around two residual sums,
whatever of it is trained. That it computes just this is found by running it: our function, the layer's
own forward and a float64 composition are held against each other before the first layer of a kind is replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import adapters, faster, glu, lora_glu, recognise, rotary, selfcheck
from . import decoder_layer as whole
from .attention import Documents, takes_documents
from .decoder_layer import Layer, Norm, Policy
from .fp8 import FP8, fp8_state
from .launch import unavailable
from .nf4 import NF4, nf4_state
from .projection import Projection
from .rope import LAYOUTS

_CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: What a model may hand its layers that does not change what they compute.
_IGNORED = {"position_ids", "cache_position", "num_items_in_batch", "output_attentions", "use_cache", "past_key_values"}


@dataclass(frozen=True)
class Found:
    """What a layer is, without its tensors: the MLP's part names, the norms' forms and what its heads do."""

    mlp: recognise.GatedMLP
    norms: tuple[recognise.Norm, ...]
    layout: Any
    policy: Policy
    parks: bool = False
    last: bool = False

    @property
    def inner_norms(self) -> bool:
        return len(self.norms) == 4


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
    """Where a layer has other parts than two norms, attention with four projections and an MLP; empty if nowhere."""
    children = dict(module.named_children())
    if further := sorted(children.keys() - _CHILDREN):
        return f"it has further parts ({', '.join(further)})"
    if lacking := sorted(_CHILDREN - children.keys()):
        return f"it has no {', '.join(lacking)}"
    lacking = [name for name in _ATTENTION if not hasattr(children["self_attn"], name)]
    return f"its attention has no {', '.join(lacking)}" if lacking else ""


def kind(module: Any) -> tuple[Any, ...]:
    """Layers of one kind have the same code and the same settings; what holds for one holds for all."""
    attention, mlp = module.self_attn, module.mlp
    norms = _norm_modules(module)
    settings = (
        attention.head_dim, getattr(attention, "scaling", None), getattr(attention, "attention_dropout", 0.0),
        *((type(m), m.weight.shape, m.weight.dtype, m.weight.requires_grad, *recognise.settings(m)) for m in norms),
        recognise.settings(module), recognise.settings(attention),
    )  # fmt: skip
    linears = (*(getattr(attention, name) for name in _ATTENTION), *mlp.children())
    return (type(module), type(attention), type(mlp), settings, *(_signature(m) for m in linears))


def found(module: Any, dtype: torch.dtype, policy: Policy, *, parks: bool = False) -> Found | str:
    """What the layer is made of, or why it is left as it is."""
    attention = module.self_attn
    extra = {name for name, _ in attention.named_children()} - {*_ATTENTION, "q_norm", "k_norm"}
    if extra or any(True for _ in attention.parameters(recurse=False)):
        return f"its attention has further parts ({', '.join(sorted(extra)) or 'parameters'})"
    config = getattr(attention, "config", None)
    implementation = getattr(config, "_attn_implementation", "sdpa")
    if implementation != "sdpa":
        return f"its attention is {implementation}, not sdpa"
    if not all(isinstance(getattr(attention, name, None), int | float) for name in ("head_dim", "scaling")):
        return "its attention has no head_dim and scaling"
    if hasattr(attention, "q_norm") != hasattr(attention, "k_norm"):
        return "only one of queries and keys is normed"
    layout = rotary.layout(type(attention).forward)
    if layout not in LAYOUTS:
        return layout
    norms = []
    for norm in _norm_modules(module):
        if not recognise.looks_like_norm(norm):
            return f"its {type(norm).__name__} is no RMSNorm"
        what = recognise.norm(norm)
        if isinstance(what, str):
            return what
        norms.append(what)
    if any(norm.weight.shape[0] != attention.head_dim for norm in _norm_modules(module)[2:]):
        return "its queries and keys are normed over all heads"
    mlp = recognise.gated_mlp(module.mlp, dtype) if recognise.looks_like_gated_mlp(module.mlp) else "its MLP is no GLU"
    if isinstance(mlp, str):
        return mlp
    if not mlp.up:
        return "its gate and up projections are one layer"
    return Found(mlp, tuple(norms), layout, policy, parks)


def build(module: Any, what: Found, x: torch.Tensor) -> tuple[Layer, list[torch.Tensor]] | str:
    """The layer as it stands now for an input like ``x``, and what of it is trained; or why it has to run by itself.

    The second as :func:`.decoder_layer.decoder_layer` takes it.
    """
    attention, mlp = module.self_attn, module.mlp
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if x.dtype != stream(module, dtype):
        return f"its input is {x.dtype} and computes in {dtype}"
    modules = [getattr(attention, name) for name in _ATTENTION]
    modules += [getattr(mlp, name) for name in (what.mlp.gate, what.mlp.up, what.mlp.down)]
    norms = _norm_modules(module)
    if adapters.hooked(attention, mlp, *modules, *norms):
        return "something listens to its parts"
    if module.training and getattr(attention, "attention_dropout", 0.0):
        return "its attention has dropout"
    projections, trained = [], [norm.weight for norm in norms if norm.weight.requires_grad]
    for linear in modules:
        read = _projection(linear, x, dtype)
        if isinstance(read, str):
            return read
        projections.append(read[0])
        trained += read[1]
    made = [
        Norm(norm.weight, known.eps, known.form, norm.weight.requires_grad)
        for norm, known in zip(norms, what.norms, strict=True)
    ]
    layer = Layer(
        made[0], made[1], tuple(projections), int(attention.head_dim), float(attention.scaling), what.mlp.activation,
        what.layout, dtype, q_norm=made[2] if what.inner_norms else None, k_norm=made[3] if what.inner_norms else None,
        policy=what.policy, parks=what.parks and x.is_cuda,
        fuses=_unit_pays(projections[4:6], dtype, x.device, what.mlp.activation),
    )  # fmt: skip
    return layer, trained


def stream(module: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the hidden states between layers that compute in ``dtype``: fp32 if their weights are."""
    weight = getattr(module.self_attn.q_proj, "weight", None)
    return torch.float32 if isinstance(weight, torch.Tensor) and weight.dtype == torch.float32 else dtype


def _unit_pays(gate_up: list[Projection], dtype: torch.dtype, device: torch.device, activation: glu.Activation) -> bool:
    gate, up = gate_up
    if not 0 < gate.rank == up.rank <= lora_glu.MAX_RANK:
        return False
    return faster.gated_unit(device, dtype, gate.out_features, gate.rank, activation).ok


def forward(self: Any, what: Found, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | str:
    """The layer's output by our function; or why its own forward has to run."""
    if len(args) != 1 or not isinstance(args[0], torch.Tensor) or args[0].dim() != 3:
        return "it was called with other than hidden states"
    x, mask, tables = args[0], kwargs.get("attention_mask"), kwargs.get("position_embeddings")
    if not isinstance(tables, tuple) or len(tables) != 2 or tables[0].shape[-1] != self.self_attn.head_dim:
        return "its rotary tables are not as wide as a head"
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
    needed = kwargs.get("needed") if what.last else None
    return whole.decoder_layer(x, tables, mask, *built, documents=documents, needed=needed)


def told_by_mask(self: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The mask of a call; made from its documents where the model was spared the making of one."""
    mask: torch.Tensor | None = kwargs.get("attention_mask")
    documents: Documents | None = kwargs.get("documents")
    if mask is not None or documents is None:
        return mask
    return documents.mask(x.shape[0], x.shape[1], getattr(self.self_attn, "sliding_window", None))


def _documents_serve(self: Any, x: torch.Tensor, documents: Documents) -> bool:
    attention, dim = self.self_attn, int(self.self_attn.head_dim)
    window = getattr(attention, "sliding_window", None)
    if window is not None and documents.longest > window:
        return False
    if sum(documents.lengths) != x.shape[0] * x.shape[1] or not takes_documents(x, dim):
        return False
    groups = attention.q_proj.out_features // attention.k_proj.out_features
    return _documents_proven(x.device, x.dtype, dim, groups)


@functools.cache
def _documents_proven(device: torch.device, dtype: torch.dtype, dim: int, groups: int) -> bool:
    return selfcheck.prove_documents(device, dtype, dim, groups).ok


def own_forward(self: Any, what: Found, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's own forward; checkpointed if little was to be kept, since the caller counts on that memory."""
    function = type(self).forward
    if what.policy == "all-but-elementwise" or not torch.is_grad_enabled() or kwargs.get("use_cache"):
        return function(self, *args, **kwargs)
    return checkpoint(function, self, *args, use_reentrant=False, **kwargs)


def reference(
    x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], layer: Layer, trained: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The layer in plain PyTorch, without a mask; float64 in gives float64 arithmetic. ``trained`` as in ours."""
    from .glu import glu_reference
    from .rms_norm import rms_norm_reference
    from .rope import rope_reference

    layer = layer.filled(trained)
    left = list(trained)[sum(norm.trained for norm in layer.norms) :]

    def linear(x: torch.Tensor, part: Projection) -> torch.Tensor:
        from . import fp8, nf4

        weight = part.weight
        if isinstance(weight, NF4):
            weight = nf4.dequantise(weight)
        elif isinstance(weight, FP8):
            weight = fp8.dequantise(weight)
        bias = part.bias.to(x.dtype) if part.bias is not None else None
        y = nn.functional.linear(x, weight.to(x.dtype), bias)
        mine = [left.pop(0).to(x.dtype) for _ in range(part.tensors)]
        if part.rank:
            a, b = mine
            y = y + nn.functional.linear(nn.functional.linear(x, a), b) * part.scaling
        return y

    def normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return rms_norm_reference(x, norm.weight.to(x.dtype), norm.eps, norm.form)

    parts = layer.projections
    n1 = normed(x, layer.norm1)
    q, k, v = (linear(n1, part).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for part in parts[:3])
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
    cos, sin = (table.to(x.dtype) for table in tables)
    q, k = rope_reference(q, k, cos, sin, layer.layout)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale)
    s = x + linear(o.transpose(1, 2).flatten(2), parts[3])
    n2 = normed(s, layer.norm2)
    return s + linear(glu_reference(linear(n2, parts[4]), linear(n2, parts[5]), layer.activation), parts[6])


def _norm_modules(module: Any) -> list[Any]:
    inner = [getattr(module.self_attn, name) for name in ("q_norm", "k_norm") if hasattr(module.self_attn, name)]
    return [module.input_layernorm, module.post_attention_layernorm, *inner]


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
