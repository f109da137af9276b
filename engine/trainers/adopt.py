"""ADOPT (arXiv:2411.02853, algorithm 2) and CAME (arXiv:2307.02047, algorithm 2), with decoupled weight decay.

ADOPT divides a gradient by the second moment as it was before that gradient, and takes the mean of what comes out::

    u = clip(g / max(√v, ε), ±t^¼)      m ← β₁ m + (1 − β₁) u      p ← p − rate·m      v ← β₂ v + (1 − β₂) g²

so that it converges with any β₂. Its first step only sets v = g².

CAME keeps Adafactor's rows and columns of the second moment, a first moment, and rows and columns of how far the update
is from it, by which that moment is divided: what the two do not agree on moves less::

    u = g / √(R ⊗ C / mean R),  at most 1 on average     m ← β₁ m + (1 − β₁) u     p ← p − rate·m / √(R′ ⊗ C′ / mean R′)

with R and C running means (β₂) of g² over each row and column, R′ and C′ (β₃) of (u − m)². Vectors have a whole second
moment and no R′, C′.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .decoupled import Decoupled

#: CAME's decay of R′ and C′, and what is added to squares of gradients and of residuals: those of its authors.
_BETA3, _EPS, _EPS_RESIDUAL = 0.9999, 1e-30, 1e-16
#: The least that ADOPT takes the root of a second moment for (ε): its authors'.
_LEAST_ROOT = 1e-6


class Adopt(Decoupled):
    """AdamW whose second moment lags by a step. Both moments are fp32: at a β₂ near 1 a narrower one would not move."""

    def move(self, p: Any, b1: float, b2: float, rate: float, keep: float) -> None:
        gradient, state = p.grad.float(), self.state[p]
        if not state:
            state["step"], state["square"] = 0, gradient.square()
            state["mean"] = torch.zeros_like(gradient)
            return
        state["step"] += 1
        bound = state["step"] ** 0.25
        update = state["square"].sqrt().clamp_(min=_LEAST_ROOT).reciprocal_().mul_(gradient)
        state["mean"].lerp_(update.clamp_(-bound, bound), 1 - b1)
        p.mul_(keep).add_(state["mean"], alpha=-rate)
        state["square"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)


class Came(Decoupled):
    """Confidence-guided memory-efficient optimisation: one state as large as the weights, and two small ones."""

    def move(self, p: Any, b1: float, b2: float, rate: float, keep: float) -> None:
        state = self.state[p]
        if not state:
            state["mean"] = torch.zeros_like(p, dtype=torch.float32)
            if p.dim() < 2:
                state["square"] = torch.zeros_like(state["mean"])
            else:
                state["square"], state["residual"] = (_factors(state["mean"]) for _ in range(2))
        update = p.grad.float()
        if p.dim() < 2:
            state["square"].lerp_(update.square().add_(_EPS), 1 - b2)
            update = update * state["square"].rsqrt()
        else:
            _follow(state["square"], update.square().add_(_EPS), b2)
            update = _divided(update, state["square"])
        update.div_(update.square().mean().sqrt_().clamp_(min=1.0))
        state["mean"].lerp_(update, 1 - b1)
        p.mul_(keep)
        if p.dim() < 2:
            p.sub_(state["mean"], alpha=rate)
            return
        _follow(state["residual"], update.sub_(state["mean"]).square_().add_(_EPS_RESIDUAL), _BETA3)
        p.sub_(_divided(state["mean"], state["residual"]), alpha=rate)


def _factors(like: Tensor) -> dict[str, Tensor]:
    """Means over the rows and over the columns of a matrix, of which a larger tensor is many."""
    return {"rows": like.new_zeros(like.shape[:-1]), "columns": like.new_zeros((*like.shape[:-2], like.shape[-1]))}


def _follow(factors: dict[str, Tensor], squares: Tensor, beta: float) -> None:
    factors["rows"].lerp_(squares.mean(-1), 1 - beta)
    factors["columns"].lerp_(squares.mean(-2), 1 - beta)


def _divided(tensor: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """A tensor over the root of what its factors stand for."""
    rows, columns = factors["rows"], factors["columns"]
    scale = (rows / rows.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return tensor * scale * columns.rsqrt().unsqueeze(-2)
