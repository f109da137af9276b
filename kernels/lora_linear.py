"""Linear layers with LoRA, alone, several on one input, or as a whole gated MLP, as differentiable functions.

The arithmetic is that of :mod:`.projection`: x·A of layers that share x is one product, and so is dA; the small
products go first and the large one adds to them in its own fp32 sums, so that y and dx are rounded once where three
calls round three times; x itself is the only large tensor kept. The MLP keeps x, gate and up, and writes its gradients
over gate and up. W and b are frozen; W is dense, NF4 or e4m3.

Dropout, DoRA, several active adapters and a trained W or bias are PEFT's business: see ``patch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import glu
from .fp8 import FP8
from .launch import as_rows
from .nf4 import NF4
from .projection import (
    Group,
    Projection,
    dense,
    expand_gradients,
    input_gradient,
    project,
    shrink,
    shrink_gradients,
)


@dataclass(frozen=True)
class Part:
    """One linear layer with its adapter.

    Args:
        weight: ``[out, in]``, dense or NF4; frozen.
        a: ``[rank, in]``; b: ``[out, rank]``; both may be wider than the dtype computed in.
        scaling: s; bias: ``[out]`` or None, frozen.
    """

    weight: torch.Tensor | NF4 | FP8
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])


def lora_linear(x: torch.Tensor, part: Part) -> torch.Tensor:
    """``[..., in]`` to ``[..., out]``."""
    return lora_group(x, (part,))[0]


def lora_group(x: torch.Tensor, parts: Sequence[Part]) -> tuple[torch.Tensor, ...]:
    """Several layers on one input (Q, K and V; gate and up); one output each.

    Args:
        x: ``[..., in]``; computed in its dtype, or in autocast's.
    """
    x = _in_compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _Group.apply(x, _frozen(parts), *_adapters(parts))


def lora_mlp(x: torch.Tensor, gate: Part, up: Part, down: Part, activation: glu.Activation) -> torch.Tensor:
    """down(f(gate(x)) · up(x)), ``[..., in]`` to ``[..., in]``.

    Its backward writes over what it saved, so it runs once per forward.
    """
    x = _in_compute_dtype(x)
    parts = (gate, up, down)
    with torch.autocast(x.device.type, enabled=False):
        return _MLP.apply(x, _frozen(parts), activation, *_adapters(parts))


def _in_compute_dtype(x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _frozen(parts: Sequence[Part]) -> tuple[Projection, ...]:
    """What autograd need not see of them."""
    return tuple(Projection(part.weight, part.bias, part.a.shape[0], part.scaling) for part in parts)


def _adapters(parts: Sequence[Part]) -> list[torch.Tensor]:
    return [tensor for part in parts for tensor in (part.a, part.b)]


def _group(parts: Sequence[Projection], adapters: Sequence[torch.Tensor], dtype: torch.dtype) -> Group:
    """The layers with their adapters in the dtype computed in, A stacked."""
    a = [one.detach().to(dtype) for one in adapters[::2]]
    return Group(
        tuple(parts), a[0] if len(a) == 1 else torch.cat(a), tuple(b.detach().to(dtype) for b in adapters[1::2])
    )


def _dense(group: Group, dtype: torch.dtype) -> list[Any]:
    return dense([part.weight for part in group.parts], dtype)


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: tuple[Projection, ...], *adapters: torch.Tensor) -> Any:
        rows, group = as_rows(x), _group(parts, adapters, x.dtype)
        xa = shrink(rows, group)
        ctx.group, ctx.dtypes = group, [adapter.dtype for adapter in adapters]
        ctx.save_for_backward(rows, xa)
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in project(rows, xa, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[Any, ...]:
        (rows, xa), group = ctx.saved_tensors, ctx.group
        dy_rows = [as_rows(dy) for dy in dys]
        dxa, dbs = expand_gradients(dy_rows, xa, group)
        das = shrink_gradients(dxa, rows, group)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(dy_rows, dxa, group, _dense(group, rows.dtype))
            dx = dx.view(*dys[0].shape[:-1], rows.shape[1])
        return dx, None, *_interleave(das, dbs, ctx.dtypes)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, parts: tuple[Projection, ...], activation: glu.Activation, *adapters: torch.Tensor
    ) -> torch.Tensor:
        rows = as_rows(x)
        pair, down = _group(parts[:2], adapters[:4], x.dtype), _group(parts[2:], adapters[4:], x.dtype)
        xa = shrink(rows, pair)
        gate, up = project(rows, xa, pair)
        h = glu.forward(gate, up, activation)
        ha = shrink(h, down)
        (y,) = project(h, ha, down)
        ctx.groups, ctx.activation, ctx.spent = (pair, down), activation, False
        ctx.dtypes = [adapter.dtype for adapter in adapters]
        ctx.save_for_backward(rows, gate, up, xa, ha)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        if ctx.spent:
            raise RuntimeError("a fused MLP was asked for its gradient twice; its saved tensors are overwritten")
        ctx.spent = True
        rows, gate, up, xa, ha = ctx.saved_tensors
        (pair, down), dy_rows, dtype = ctx.groups, as_rows(dy), rows.dtype

        dha, db_down = expand_gradients([dy_rows], ha, down)
        dh = input_gradient([dy_rows], dha, down, _dense(down, dtype))
        glu.backward(dh, gate, up, ctx.activation, dgate=gate, dup=up, h=dh)  # dh becomes h
        da_down = shrink_gradients(dha, dh, down)
        dxa, dbs = expand_gradients([gate, up], xa, pair)
        das = shrink_gradients(dxa, rows, pair)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient([gate, up], dxa, pair, _dense(pair, dtype)).view(*dy.shape[:-1], rows.shape[1])
        return dx, None, None, *_interleave([*das, *da_down], [*dbs, *db_down], ctx.dtypes)


def _interleave(
    das: Sequence[torch.Tensor | None], dbs: Sequence[torch.Tensor | None], dtypes: Sequence[torch.dtype]
) -> list[torch.Tensor]:
    flat = [gradient for pair in zip(das, dbs, strict=True) for gradient in pair]
    return [gradient.to(dtype) for gradient, dtype in zip(flat, dtypes, strict=True) if gradient is not None]


def lora_linear_reference(x: torch.Tensor, part: Part) -> torch.Tensor:
    """The same as PEFT does it, for a dense weight; float64 in gives float64 arithmetic."""
    assert isinstance(part.weight, torch.Tensor)
    bias = part.bias.to(x.dtype) if part.bias is not None else None
    result = torch.nn.functional.linear(x, part.weight.to(x.dtype), bias)
    small = torch.nn.functional.linear(torch.nn.functional.linear(x, part.a.to(x.dtype)), part.b.to(x.dtype))
    return result + small * part.scaling
