"""The replacements themselves: for each kernel, who can use it in a model, and the forward that does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from . import adapters, glu, layerproof, layers, lora_linear, recognise, rms_norm, rope, rotary, selfcheck
from .decoder_layer import Keeping
from .launch import unavailable
from .replacement import STATE, Replacement

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Patch:
    """What a new forward knows: its kernel, the structure found, and for which inputs the kernel is proven.

    ``fallback`` says why the module's own forward ran last time it had to.
    """

    kernel: str
    found: Any = None
    verdicts: dict[tuple[Any, ...], selfcheck.Verdict] = field(default_factory=dict)
    fallback: str = ""


def find_layers(model: nn.Module, dtype: torch.dtype, keeping: Keeping | None = None) -> Iterator[Replacement]:
    keeping = keeping or Keeping()
    known: dict[Any, layers.Found | str] = {}
    modules = [(path, module) for path, module in model.named_modules() if layers.looks_like_layer(module)]
    for place, (path, module) in enumerate(modules):
        found: layers.Found | str = layers.otherwise_built(module)
        found = found or _obstacle(module, next(module.parameters()).device)
        if not found:
            policy, parks = keeping.of(place, len(modules))
            kind = (layers.kind(module), policy, parks)
            if kind not in known:
                known[kind] = layerproof.recognise(module, dtype, policy, parks=parks)
            found = known[kind]
        if isinstance(found, layers.Found):
            found = replace(found, last=place == len(modules) - 1)
            _install(module, Patch("decoder_layer", found), _layer_forward)
            yield Replacement(path, "decoder_layer", True, found.policy + (", parked" if found.parks else ""))
        else:
            yield Replacement(path, "decoder_layer", False, found)


def _loras(model: nn.Module, dtype: torch.dtype) -> Iterator[Replacement]:
    known: dict[Any, str] = {}  # what holds for one layer holds for all of its kind
    for path, module in model.named_modules():
        if adapters.looks_like_lora(module):
            parameters = list(module.parameters())
            device = parameters[0].device
            why = _obstacle(module, device)
            if not why:
                kind = (device, layers._signature(module), *((p.dtype, p.requires_grad) for p in parameters))
                if kind not in known:
                    known[kind] = adapters.obstacle(module) or adapters.disagreement(module, dtype)
                why = known[kind]
            if not why:
                _install(module, Patch("lora"), _lora_forward)
            yield Replacement(path, "lora", not why, why or "equal to PEFT's")


def _norms(model: nn.Module, dtype: torch.dtype) -> Iterator[Replacement]:
    known: dict[Any, recognise.Norm | str] = {}
    for path, module in model.named_modules():
        if not recognise.looks_like_norm(module):
            continue
        weight: Any = module.weight
        found: recognise.Norm | str = _obstacle(module, weight.device)
        if not found:
            kind = (*_kind(module), weight.shape, weight.dtype, weight.device)
            if kind not in known:
                known[kind] = recognise.norm(module)
            found = known[kind]
        if isinstance(found, str):
            yield Replacement(path, "rms_norm", False, found)
            continue
        patch = Patch("rms_norm", found)
        verdict = _prove_norm(found, dtype, weight)
        if verdict.ok:
            _install(module, patch, _norm_forward)
        yield Replacement(path, "rms_norm", verdict.ok, found.form if verdict.ok else verdict.why)


def _rotaries(model: nn.Module, dtype: torch.dtype) -> Iterator[Replacement]:
    for path, module in model.named_modules():
        if not rotary.looks_rotary(module):
            continue
        device = next(module.parameters()).device
        found = _obstacle(module, device) or rotary.layout(type(module).forward)
        dim = getattr(module, "head_dim", None) or 128
        verdict = selfcheck.Verdict(False, found)
        if found in rope.LAYOUTS:
            verdict = selfcheck.prove_rope(device, dtype, dim, dim, found)
        if verdict.ok:
            _install(module, Patch("rope", found), _rotary_forward)
        yield Replacement(path, "rope", verdict.ok, found if verdict.ok else verdict.why)


def _mlps(model: nn.Module, dtype: torch.dtype) -> Iterator[Replacement]:
    known: dict[Any, recognise.GatedMLP | str] = {}
    for path, module in model.named_modules():
        if not recognise.looks_like_gated_mlp(module):
            continue
        device = next(module.parameters()).device
        found: recognise.GatedMLP | str = _obstacle(module, device)
        if not found:
            parts = tuple((name, *_kind(child), layers._signature(child)) for name, child in module.named_children())
            functions = tuple(value for value in vars(module).values() if callable(value))
            kind = (*_kind(module), device, parts, functions)
            if kind not in known:
                known[kind] = recognise.gated_mlp(module, dtype)
            found = known[kind]
        if isinstance(found, str):
            yield Replacement(path, "glu", False, found)
            continue
        width = getattr(module, found.down).in_features
        verdict = selfcheck.prove_glu(device, dtype, width, found.activation)
        if verdict.ok:
            _install(module, Patch("glu", found), _mlp_forward)
        yield Replacement(path, "glu", verdict.ok, found.activation if verdict.ok else verdict.why)


FINDERS: dict[str, Callable[[nn.Module, torch.dtype], Iterator[Replacement]]] = {
    "lora": _loras,
    "rms_norm": _norms,
    "rope": _rotaries,
    "glu": _mlps,
}


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What a module without tensors of its own, but for weight and bias, shares with those that compute the same.

    One with further tensors is one of its kind: they may hold another number in each layer.
    """
    own = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    own += [name for name, _ in module.named_buffers(recurse=False)]
    own += [name for name, _ in module.named_parameters(recurse=False) if name not in ("weight", "bias")]
    return type(module), recognise.settings(module), id(module) if own else None


def _obstacle(module: nn.Module, device: torch.device) -> str:
    if "forward" in vars(module):
        return "its forward was already replaced by something else"
    return unavailable(device)


def _install(module: nn.Module, patch: Patch, forward: Callable[..., torch.Tensor]) -> None:
    setattr(module, STATE, patch)
    # A partial, not a closure or a method: with its module it survives copy.deepcopy and pickling.
    module.forward = functools.partial(forward, module)


def _stock(module: nn.Module, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.is_grad_enabled():  # what is only looked at, as the base below its adapters is, may take any way
        getattr(module, STATE).fallback = why
    return type(module).forward(module, *args, **kwargs)


def _unfit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a call is not one tensor that a kernel can take."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        return "it was called with more than one tensor"
    if args[0].dtype not in _DTYPES:
        return f"its input is {args[0].dtype}"
    return unavailable(args[0].device)


def _layer_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    patch: Patch = getattr(self, STATE)
    out = layers.forward(self, patch.found, args, kwargs) if torch.is_grad_enabled() else ""
    if not isinstance(out, str):
        return out
    patch.fallback = out or patch.fallback
    if kwargs.get("documents") is not None:
        kwargs = kwargs | {"attention_mask": layers.told_by_mask(self, args[0], kwargs)}
    return layers.own_forward(self, patch.found, args, kwargs)


def _lora_forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    why = _unfit(args, kwargs)
    part = why or adapters.part(self, args[0].dtype, args[0].device)
    if isinstance(part, str):
        return _stock(self, part, args, kwargs)
    return lora_linear.lora_linear(args[0], part)


def _norm_forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    weight: Any = self.weight
    patch: Patch = getattr(self, STATE)
    why = _unfit(args, kwargs)
    if not why and (args[0].device != weight.device or args[0].shape[-1] != weight.shape[0]):
        why = "its input does not fit its weight"
    if not why:
        key = (args[0].dtype, weight.dtype, weight.device)
        if key not in patch.verdicts:
            patch.verdicts[key] = _prove_norm(patch.found, args[0].dtype, weight)
        why = patch.verdicts[key].why
    if why:
        return _stock(self, why, args, kwargs)
    return rms_norm.rms_norm(args[0], weight, patch.found.eps, patch.found.form)


def _rotary_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return rotary.rebound(type(self).forward, _rope_allowed)(self, *args, **kwargs)


def _mlp_forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    if why := _unfit(args, kwargs):
        return _stock(self, why, args, kwargs)
    patch: Patch = getattr(self, STATE)
    found: recognise.GatedMLP = patch.found
    x = args[0]
    children = [getattr(self, name) for name in (found.gate, found.up, found.down) if name]
    parts = _lora_parts(children, x)
    if parts is not None and not _glu_unproven(patch, parts[2].a.shape[1], _autocast_dtype(x), x.device):
        return lora_linear.lora_mlp(x, *parts, found.activation)
    gate = children[0](x)
    gate, up = (gate, children[1](x)) if found.up else gate.chunk(2, dim=-1)
    if gate.dtype != up.dtype or gate.shape != up.shape or gate.dtype not in _DTYPES:
        patch.fallback = f"gate is {gate.dtype}, up {up.dtype}"
    else:
        patch.fallback = _glu_unproven(patch, gate.shape[-1], gate.dtype, gate.device)
    return children[-1]((glu.glu_reference if patch.fallback else glu.glu)(gate, up, found.activation))


def _lora_parts(
    children: list[nn.Module], x: torch.Tensor
) -> tuple[lora_linear.Part, lora_linear.Part, lora_linear.Part] | None:
    """The three layers of an MLP, if each is a LoRA layer that ours may run and nothing listens to them."""
    if len(children) != 3 or adapters.hooked(*children):
        return None
    if any(getattr(vars(child).get(STATE), "kernel", "") != "lora" for child in children):
        return None
    dtypes = (x.dtype, x.dtype, _autocast_dtype(x))
    parts = [adapters.part(child, dtype, x.device) for child, dtype in zip(children, dtypes, strict=True)]
    gate, up, down = (None if isinstance(part, str) else part for part in parts)
    return (gate, up, down) if gate and up and down else None


def _autocast_dtype(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _glu_unproven(patch: Patch, width: int, dtype: torch.dtype, device: torch.device) -> str:
    key = (width, dtype, device)
    if key not in patch.verdicts:
        patch.verdicts[key] = selfcheck.prove_glu(device, dtype, width, patch.found.activation)
    return patch.verdicts[key].why


@functools.cache
def _rope_allowed(device: torch.device, dtype: torch.dtype, dim: int, places: int, layout: rope.Layout) -> bool:
    return selfcheck.prove_rope(device, dtype, dim, places, layout).ok


def _prove_norm(found: recognise.Norm, dtype: torch.dtype, weight: torch.Tensor) -> selfcheck.Verdict:
    return selfcheck.prove_rms_norm(weight.device, dtype, weight.dtype, weight.shape[0], found.eps, found.form)
