"""Linear layers with LoRA, alone, several on one input, or as a whole gated MLP.

    y_i  = x·W_iᵀ + b_i + s_i·(x·A_iᵀ)·B_iᵀ
    dXA_i = s_i·dy_i·B_i          dB_i = s_i·dy_iᵀ·(x·A_iᵀ)          dA_i = dXA_iᵀ·x
    dx    = Σ_i dXA_i·A_i + Σ_i dy_i·W_i

Source: Hu et al., "LoRA", arXiv 2106.09685. W and b are frozen; W is dense or NF4, then dequantised into memory that
every layer shares, once forward and once backward.

What is saved by hand here: x·A of layers that share x is one product, and so is dA; the small products go first and
the large one adds to them in its own fp32 sums (β = 1), so that y and dx are rounded once where three calls round
three times; nothing is copied to apply s; x itself is the only large tensor kept. The MLP keeps x, gate and up, and
writes its gradients over gate and up.

Dropout, DoRA, several active adapters and a trained W or bias are PEFT's business: see ``patch``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import glu
from .launch import as_rows
from .nf4 import NF4, dequantise, scratch


@dataclass(frozen=True)
class Part:
    """One linear layer with its adapter.

    Args:
        weight: ``[out, in]``, dense or NF4; frozen.
        a: ``[rank, in]``; b: ``[out, rank]``; both may be wider than the dtype computed in.
        scaling: s; bias: ``[out]`` or None, frozen.
    """

    weight: torch.Tensor | NF4
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])


@dataclass(frozen=True)
class _Frozen:
    """What autograd need not see of a :class:`Part`."""

    weight: torch.Tensor | NF4
    scaling: float
    bias: torch.Tensor | None

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


def _frozen(parts: Sequence[Part]) -> tuple[_Frozen, ...]:
    return tuple(_Frozen(part.weight, part.scaling, part.bias) for part in parts)


def _adapters(parts: Sequence[Part]) -> list[torch.Tensor]:
    return [tensor for part in parts for tensor in (part.a, part.b)]


def _dense(weights: Sequence[torch.Tensor | NF4], dtype: torch.dtype) -> list[torch.Tensor]:
    """The weights in ``dtype``; NF4 ones side by side in scratch memory, to be used before the next call."""
    sizes = [math.prod(w.shape) if isinstance(w, NF4) else 0 for w in weights]
    device = next((w.packed.device for w in weights if isinstance(w, NF4)), None)
    buffer = scratch((sum(sizes),), dtype, device) if device is not None else torch.empty(0)
    dense, start = [], 0
    for weight, size in zip(weights, sizes, strict=True):
        if isinstance(weight, NF4):
            if weight.dtype == dtype:
                dense.append(dequantise(weight, buffer[start : start + size].view(weight.shape)))
            else:
                dense.append(dequantise(weight).to(dtype))
            start += size
        else:
            dense.append(weight.to(dtype))
    return dense


def _down(x: torch.Tensor, a: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """x·Aᵀ of all adapters in one product, and the stacked A ``[Σ rank, in]`` in x's dtype."""
    stacked = a[0].to(x.dtype) if len(a) == 1 else torch.cat([one.to(x.dtype) for one in a])
    return torch.mm(x, stacked.t()), stacked


def _forward(
    x: torch.Tensor, xa: torch.Tensor, weight: torch.Tensor, b: torch.Tensor, frozen: _Frozen, out: torch.Tensor
) -> None:
    """out = bias + s·xa·Bᵀ + x·Wᵀ, the large product last and into the sum."""
    b = b.to(x.dtype)
    if frozen.bias is None:
        torch.addmm(out, xa, b.t(), beta=0, alpha=frozen.scaling, out=out)
    else:
        torch.addmm(frozen.bias.to(x.dtype), xa, b.t(), alpha=frozen.scaling, out=out)
    torch.addmm(out, x, weight.t(), out=out)


def _adapter_gradients(
    dy: torch.Tensor, xa: torch.Tensor, b: torch.Tensor, scaling: float, dxa: torch.Tensor
) -> torch.Tensor:
    """dB, and dXA written into ``dxa``; s is applied to the sums, not to copies."""
    torch.addmm(dxa, dy, b.to(dy.dtype), beta=0, alpha=scaling, out=dxa)
    db = torch.empty(b.shape, dtype=dy.dtype, device=dy.device)
    return torch.addmm(db, dy.t(), xa, beta=0, alpha=scaling, out=db).to(b.dtype)


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: tuple[_Frozen, ...], *adapters: torch.Tensor) -> Any:
        rows, a, b = as_rows(x), adapters[::2], adapters[1::2]
        xa, _ = _down(rows, a)
        ranks = [one.shape[0] for one in a]
        outputs = []
        weights = _dense([part.weight for part in parts], x.dtype)
        for part, weight, mine, small in zip(parts, weights, xa.split(ranks, dim=1), b, strict=True):
            out = torch.empty(rows.shape[0], part.out_features, dtype=x.dtype, device=x.device)
            _forward(rows, mine, weight, small, part, out)
            outputs.append(out.view(*x.shape[:-1], part.out_features))
        ctx.parts, ctx.ranks = parts, ranks
        ctx.save_for_backward(rows, xa, *adapters)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[Any, ...]:
        rows, xa, *adapters = ctx.saved_tensors
        a, b = adapters[::2], adapters[1::2]
        dy_rows = [as_rows(dy) for dy in dys]
        dxa = torch.empty_like(xa)
        columns = list(zip(xa.split(ctx.ranks, dim=1), dxa.split(ctx.ranks, dim=1), strict=True))
        dbs = [
            _adapter_gradients(dy, mine, small, part.scaling, dmine)
            for dy, (mine, dmine), small, part in zip(dy_rows, columns, b, ctx.parts, strict=True)
        ]
        das = torch.mm(dxa.t(), rows).split(ctx.ranks)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dxa, torch.cat([one.to(rows.dtype) for one in a]))
            weights = _dense([part.weight for part in ctx.parts], rows.dtype)
            for dy, weight in zip(dy_rows, weights, strict=True):
                torch.addmm(dx, dy, weight, out=dx)
            dx = dx.view(*dys[0].shape[:-1], rows.shape[1])
        return dx, None, *_interleave([da.to(one.dtype) for da, one in zip(das, a, strict=True)], dbs)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, parts: tuple[_Frozen, ...], activation: glu.Activation, *adapters: torch.Tensor
    ) -> torch.Tensor:
        rows, (a_gate, b_gate, a_up, b_up, a_down, b_down) = as_rows(x), adapters
        xa, _ = _down(rows, (a_gate, a_up))
        ranks, width = [a_gate.shape[0], a_up.shape[0]], parts[0].out_features
        gate, up = (torch.empty(rows.shape[0], width, dtype=x.dtype, device=x.device) for _ in range(2))
        weights = _dense([part.weight for part in parts[:2]], x.dtype)
        for out, part, weight, mine, small in zip(
            (gate, up), parts, weights, xa.split(ranks, dim=1), (b_gate, b_up), strict=False
        ):
            _forward(rows, mine, weight, small, part, out)
        h = glu.forward(gate, up, activation)
        ha, _ = _down(h, (a_down,))
        y = torch.empty(rows.shape[0], parts[2].out_features, dtype=x.dtype, device=x.device)
        _forward(h, ha, _dense([parts[2].weight], x.dtype)[0], b_down, parts[2], y)
        ctx.parts, ctx.activation, ctx.spent = parts, activation, False
        ctx.save_for_backward(rows, gate, up, xa, ha, *adapters)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        if ctx.spent:
            raise RuntimeError("a fused MLP was asked for its gradient twice; its saved tensors are overwritten")
        ctx.spent = True
        rows, gate, up, xa, ha, *adapters = ctx.saved_tensors
        a_gate, b_gate, a_up, b_up, a_down, b_down = adapters
        part_gate, part_up, part_down = ctx.parts
        dy_rows, dtype = as_rows(dy), rows.dtype

        dha = torch.empty_like(ha)
        db_down = _adapter_gradients(dy_rows, ha, b_down, part_down.scaling, dha)
        dh = torch.mm(dha, a_down.to(dtype))
        torch.addmm(dh, dy_rows, _dense([part_down.weight], dtype)[0], out=dh)
        glu.backward(dh, gate, up, ctx.activation, dgate=gate, dup=up, h=dh)  # dh becomes h
        da_down = torch.mm(dha.t(), dh).to(a_down.dtype)

        ranks = [a_gate.shape[0], a_up.shape[0]]
        dxa = torch.empty_like(xa)
        (xa_gate, xa_up), (dxa_gate, dxa_up) = xa.split(ranks, dim=1), dxa.split(ranks, dim=1)
        db_gate = _adapter_gradients(gate, xa_gate, b_gate, part_gate.scaling, dxa_gate)
        db_up = _adapter_gradients(up, xa_up, b_up, part_up.scaling, dxa_up)
        da_gate, da_up = torch.mm(dxa.t(), rows).split(ranks)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dxa, torch.cat((a_gate.to(dtype), a_up.to(dtype))))
            for d, weight in zip((gate, up), _dense([part_gate.weight, part_up.weight], dtype), strict=True):
                torch.addmm(dx, d, weight, out=dx)
            dx = dx.view(*dy.shape[:-1], rows.shape[1])
        das = [da_gate.to(a_gate.dtype), da_up.to(a_up.dtype), da_down]
        return dx, None, None, *_interleave(das, [db_gate, db_up, db_down])


def _interleave(das: list[torch.Tensor], dbs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [gradient for pair in zip(das, dbs, strict=True) for gradient in pair]


def lora_linear_reference(x: torch.Tensor, part: Part) -> torch.Tensor:
    """The same as PEFT does it, for a dense weight; float64 in gives float64 arithmetic."""
    assert isinstance(part.weight, torch.Tensor)
    bias = part.bias.to(x.dtype) if part.bias is not None else None
    result = torch.nn.functional.linear(x, part.weight.to(x.dtype), bias)
    small = torch.nn.functional.linear(torch.nn.functional.linear(x, part.a.to(x.dtype)), part.b.to(x.dtype))
    return result + small * part.scaling
