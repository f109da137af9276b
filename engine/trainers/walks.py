"""What a trainer asks of a model in every step, without a walk over all its modules."""

from __future__ import annotations

from typing import Any

import torch


def shorten_walks(model: Any, trained: list[torch.nn.Parameter]) -> None:
    """Two things: that gradients are cleared, and that a mode is set.

    Between the last kernel of one step and the first of the next the GPU waits for such walks: some thousand modules,
    to clear gradients that only ``trained`` can have and to set a mode that is set already. That it is set is known of
    a walk made here alone: what the model says of itself need not hold inside it. PEFT's wrapper begins in training
    mode around a base in evaluation mode, as transformers loads it, whose layers would neither drop out nor recompute.
    """
    stock_train, walked = model.train, False

    def zero_grad(set_to_none: bool = True) -> None:
        for p in trained:
            if set_to_none or p.grad is None:
                p.grad = None
            else:
                p.grad.detach_().zero_()

    def train(mode: bool = True) -> Any:
        nonlocal walked
        if not (walked and mode and model.training):
            stock_train(mode)
            walked = True
        return model

    model.zero_grad, model.train = zero_grad, train
