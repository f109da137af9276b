"""LoRA layers of a loaded model, known by their attributes: what PEFT wraps around a linear layer.

A layer is taken over for the plain case, one adapter on a frozen dense or NF4 weight. Everything else (dropout while
training, DoRA and other variants, several or no active adapters, merged weights, a trained weight or bias) stays with
PEFT's own forward; what holds for good is told once, what may change from step to step is looked at in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .fp8 import FP8, fp8_state
from .lora_linear import Part, lora_linear
from .nf4 import NF4, nf4_state

_CHILDREN = {"lora_B", "lora_dropout", "base_layer"}


def looks_like_lora(module: nn.Module) -> bool:
    """A linear layer inside, and adapters by name beside it."""
    children = module._modules
    # AdaLoRA's are bare parameters, with a third factor between.
    if not isinstance(children.get("lora_A"), nn.ModuleDict) or not children.keys() >= _CHILDREN:
        return False
    named = hasattr(module, "scaling") and hasattr(module, "active_adapters")
    return named and hasattr(children["base_layer"], "in_features")


def obstacle(module: Any) -> str:
    """Why this layer is left to PEFT for good; empty if it is not."""
    if not module.lora_A:
        return "it has no adapter of the usual form"
    base = module.base_layer
    weight = getattr(base, "weight", None)
    if hasattr(module, "parameter_name") or not isinstance(weight, torch.Tensor):
        return "it adapts a parameter of a larger module, not a linear layer"
    if weight.is_meta:
        return "its weights are not loaded"
    if getattr(weight, "quant_state", None) is not None:
        state = nf4_state(weight)
        if isinstance(state, str):
            return state
    elif type(base).forward is not nn.Linear.forward or not weight.is_floating_point():
        return f"its base layer, {type(base).__name__}, is neither a plain linear layer nor NF4"
    for name in module.lora_A:
        if name in getattr(module, "lora_variant", {}):
            return f"adapter {name!r} is {type(module.lora_variant[name]).__name__}, which is left to PEFT"
        if getattr(module.lora_dropout[name], "p", 0.0) > 0:
            return f"adapter {name!r} has dropout, which is left to PEFT"
        if module.lora_A[name].bias is not None or module.lora_B[name].bias is not None:
            return f"adapter {name!r} has a bias, which is left to PEFT"
    return ""


def part(module: Any, x_dtype: torch.dtype, device: torch.device) -> Part | str:
    """The layer as it stands now, for an input of that dtype and place; or why PEFT has to run it.

    Children are looked up where they are kept: a model's layers are read like this in every step, and the walk of
    ``nn.Module.__getattr__`` takes longer than all else here.
    """
    active, children = module.active_adapters, module._modules
    if module.disable_adapters or module.merged:
        return "its adapters are switched off or merged"
    if len(active) != 1 or active[0] not in children["lora_A"]._modules:
        return f"{len(active)} adapters are active"
    name, base = active[0], children["base_layer"]
    outer, inner = children["lora_B"]._modules[name], children["lora_A"]._modules[name]
    a, b, stored, bias = _own(inner, "weight"), _own(outer, "weight"), _own(base, "weight"), _own(base, "bias")
    if name in getattr(module, "lora_variant", {}):
        return "its adapter is of another kind than plain LoRA"
    if hooked(base, inner, outer):
        return "something listens to its parts"
    if stored.requires_grad or (bias is not None and bias.requires_grad):
        return "its base layer is trained"
    if getattr(children["lora_dropout"]._modules[name], "p", 0.0) > 0 and module.training:
        return "its adapter has dropout"
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else x_dtype
    if not autocast and not (a.dtype == b.dtype == dtype):
        return f"its adapter is {a.dtype}, its input {x_dtype}, and autocast is off"
    weight: torch.Tensor | NF4 | FP8 = stored
    if getattr(stored, "quant_state", None) is not None:
        if x_dtype != dtype or getattr(base, "compute_dtype", None) not in (None, dtype):
            return f"its input is {x_dtype}, and its NF4 weight computes in {getattr(base, 'compute_dtype', None)}"
        state = nf4_state(stored)
        if isinstance(state, str):
            return state
        weight = state
    elif (packed := fp8_state(base)) is not None:
        weight = packed
    elif not autocast and stored.dtype != dtype:
        return f"its weight is {stored.dtype}, its input {x_dtype}, and autocast is off"
    if device != a.device:
        return "its adapter is on another device than its input"
    return Part(weight, a, b, float(module.scaling[name]), bias)


def _own(module: nn.Module, name: str) -> Any:
    """A parameter of a module, or what stands for one."""
    return module._parameters[name] if name in module._parameters else getattr(module, name)


def disagreement(module: Any, dtype: torch.dtype) -> str:
    """Where our layer and PEFT's differ on a small input, forward and backward; empty if they don't.

    The adapter's weights are replaced by random ones for the moment: B starts at zero, which would hide it.
    """
    name = next(iter(module.lora_A))
    device = module.lora_A[name].weight.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    new_a = random(*a.shape, scale=a.shape[1] ** -0.5).to(a.dtype)
    new_b = random(*b.shape, scale=0.5 * b.shape[1] ** -0.5).to(b.dtype)
    x, dy = random(2, 4, a.shape[1]).to(dtype), random(2, 4, b.shape[0])

    def run(layer: Part | None) -> Sequence[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, new_a, new_b)]
        if layer is not None:
            y = lora_linear(leaves[0], Part(layer.weight, leaves[1], leaves[2], layer.scaling, layer.bias))
        else:
            swapped = {f"lora_A.{name}.weight": leaves[1], f"lora_B.{name}.weight": leaves[2]}
            y = torch.func.functional_call(module, swapped, (leaves[0],))
        return (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype)))

    with torch.enable_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        layer = part(module, dtype, device)
        if isinstance(layer, str):
            return layer
        mine, stock = run(layer), run(None)
    limit = max(2 * torch.finfo(dtype).eps, 1e-5)
    for what, got, expected in zip(("output", "dx", "dA", "dB"), mine, stock, strict=True):
        if got.dtype != expected.dtype or got.shape != expected.shape:
            return f"{what} has another dtype or shape than PEFT's"
        distance = ((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)).item()
        if not distance <= limit:
            return f"{what} lies {distance:.1e} from PEFT's"
    return ""


def hooked(*modules: nn.Module) -> bool:
    """Something listens to these modules, and would no longer hear them if they were bypassed."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)
