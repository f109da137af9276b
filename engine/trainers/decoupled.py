"""Decoupled: the base of optimisers that move one weight after another, with decoupled weight decay."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Decoupled(Optimizer):
    """Of each weight with a gradient, :meth:`move` is what a step does."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            (b1, b2), rate = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, b1, b2, rate, 1 - rate * group["weight_decay"])

    def move(self, p: Any, b1: float, b2: float, rate: float, keep: float) -> None:
        """Move a weight.

        Args:
            keep: the share of the weight that its decay leaves.
        """
        raise NotImplementedError
