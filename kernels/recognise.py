"""What a module does, found from its attributes and from running it: never from the name of its class.

A module that looks right but behaves otherwise (a multiplier, a sparsity, a second dropout) is not recognised, and
the reason says so. Nothing here changes a module or the global random state.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .glu import ACTIVATIONS, Activation, glu_reference
from .rms_norm import FORMS, Form, rms_norm_reference

_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_ACT = ("act_fn", "activation_fn", "act", "activation")
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_MERGED = (("gate_up_proj", "down_proj"),)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: its casting form and its epsilon."""

    form: Form
    eps: float


@dataclass(frozen=True)
class GatedMLP:
    """A gated MLP: the names of its parts (``up`` is empty if gate and up are one projection)."""

    activation: Activation
    gate: str
    up: str
    down: str


def looks_like_norm(module: nn.Module) -> bool:
    """One 1-D weight, no bias, an epsilon, no children."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    weight = getattr(module, "weight", None)
    return (
        names == ["weight"]
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 1
        and not any(True for _ in module.children())
        and _eps(module) is not None
    )


def norm(module: nn.Module) -> Norm | str:
    """The norm that ``module`` computes, or why it is not recognised.

    It is run with random weights put in for the moment: a fresh norm's weights are all 1 (or 0), under which the
    forms can't be told apart, and two sizes of input show whether epsilon acts where it is thought to.
    """
    eps = _eps(module)
    if eps is None:
        return "no epsilon among its attributes"
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        return "its weight is not loaded"
    columns, device = weight.shape[0], weight.device
    generator = torch.Generator().manual_seed(0)
    trial_weight = (torch.rand(columns, generator=generator) + 0.5).to(device)
    rows = torch.randn(4, columns, generator=generator).to(device)
    closest: dict[Form, float] = dict.fromkeys(FORMS, 0.0)
    for dtype in (torch.bfloat16, torch.float32):
        for scale in (1.0, eps**0.5):
            x, w = (rows * scale).to(dtype), trial_weight.to(dtype)
            try:
                with torch.no_grad(), torch.autocast(device.type, enabled=False):
                    out = torch.func.functional_call(module, {"weight": w}, (x,))
            except Exception as error:  # a foreign forward may raise anything on a plain input
                return f"does not take one tensor ({type(error).__name__})"
            if not isinstance(out, torch.Tensor) or out.shape != x.shape:
                return "does not return one tensor like its input"
            for form in FORMS:
                expected = rms_norm_reference(x, w, eps, form)
                # In bf16 the forms lie 1e-3 apart; in fp32 one that differs from all by 1e-4 is another function.
                limit = 4e-4 if dtype == torch.bfloat16 else 1e-5
                closest[form] = max(closest[form], _distance(out, expected) / limit)
    form = min(closest, key=lambda f: closest[f])
    return Norm(form, eps) if closest[form] < 1.0 else "does not compute an RMSNorm of a known form"


def looks_like_gated_mlp(module: nn.Module) -> bool:
    """Gate, up and down projections and an activation."""
    return _parts(module) is not None and _activation(module) is not None


def gated_mlp(module: nn.Module, dtype: torch.dtype) -> GatedMLP | str:
    """The gated MLP that ``module`` computes, or why it is not recognised.

    Its forward is held against down(f(gate(x))·up(x)), composed of its own children, in training and in evaluation
    mode from one random state: a dropout or a multiplier between the parts shows. Weights wider than ``dtype`` compute
    in it under autocast, as they do in training.
    """
    parts, act = _parts(module), _activation(module)
    if parts is None or act is None:
        return "no gate, up and down projection with an activation"
    gate, up, down = parts
    first = getattr(module, gate)
    weight = next(first.parameters())
    if weight.is_meta:
        return "its weights are not loaded"
    activation = activation_of(act, weight.device)
    if activation is None:
        return f"its activation, {type(act).__name__}, is none of {', '.join(ACTIVATIONS)}"
    width = getattr(first, "in_features", None)
    if not isinstance(width, int):
        return "its gate projection is not a linear layer"
    # With a gradient to come: without one, bitsandbytes repacks its weights for inference on some CPUs.
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype).requires_grad_()

    def composed(x: torch.Tensor) -> torch.Tensor:
        if not up:
            halves = first(x).chunk(2, dim=-1)
            return getattr(module, down)(glu_reference(halves[0], halves[1], activation))
        return getattr(module, down)(glu_reference(first(x), getattr(module, up)(x), activation))

    for training in (True, False):
        try:
            autocast = torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32)
            with torch.enable_grad(), autocast, _mode(module, training):
                expected, found = (_seeded(f, x) for f in (functools.partial(type(module).forward, module), composed))
        except Exception as error:  # a foreign forward may raise anything on a plain input
            return f"does not take one tensor ({type(error).__name__})"
        if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
            return "does not return one tensor like its input"
        if _distance(found, expected) > 1e-3:
            return "does more than down(f(gate(x))·up(x))"
    return GatedMLP(activation, gate, up, down)


def activation_of(act: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> Activation | None:
    """Which of the known activations a callable is, by its values."""
    x = torch.linspace(-8.0, 8.0, 513, device=device)
    with torch.no_grad():
        try:
            y = act(x)
        except Exception:  # not a function of one tensor, so not one of ours
            return None
        for name in ACTIVATIONS:
            if isinstance(y, torch.Tensor) and torch.allclose(y, glu_reference(x, torch.ones_like(x), name), atol=2e-6):
                return name
    return None


def settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The plain numbers among a module's attributes: with its class, they decide what it computes."""
    values = ((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str))
    return tuple(sorted((name, value) for name, value in values if name not in ("training", "layer_idx")))


def _eps(module: nn.Module) -> float | None:
    values = (getattr(module, name, None) for name in _EPS)
    return next((float(value) for value in values if isinstance(value, float)), None)


def _parts(module: nn.Module) -> tuple[str, str, str] | None:
    children = dict(module.named_children())
    for gate, up, down in _GATED:
        if {gate, up, down} <= children.keys():
            return gate, up, down
    for gate, down in _MERGED:
        if {gate, down} <= children.keys():
            return gate, "", down
    return None


def _activation(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    return next((f for name in _ACT if callable(f := getattr(module, name, None))), None)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative Frobenius distance; infinite between different dtypes, as a cast is part of what a module does."""
    if a.dtype != b.dtype:
        return float("inf")
    a, b = a.detach(), b.detach()
    distance = ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()
    return distance if distance == distance else float("inf")


def _seeded(f: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return f(x)


@contextlib.contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(child, child.training) for child in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for child, was in before:
            child.training = was
