"""Projections whose frozen weights are multiplied in e4m3; the counterpart of :mod:`.projection` for such a group.

    y_i = x·W_iᵀ + b_i + s_i·(x·A_iᵀ)·B_iᵀ (+ a residual)          dx = Σ_i dXA_i·A_i + dy·W

Layers of one input share its quantised copy, and where their weights lie side by side they are one product each way.
An 8-bit product can't add to what is there, so what LoRA, bias and residual add is one pass over the product
(:mod:`.lora_add`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .fp8 import FP8, input_gradient, joined, product, quantise
from .lora_add import add_to


def project(
    x: torch.Tensor, weights: Sequence[FP8], biases: Sequence[torch.Tensor | None],
    shares: Sequence[torch.Tensor | None], bs: Sequence[torch.Tensor | None], scalings: Sequence[float],
    *, add: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """All outputs of layers of one input, each ``[rows, out]`` plus ``add``; they may be parts of one tensor.

    Args:
        shares: x·A of each ``[rows, rank]``, or None; bs: its B ``[out, rank]``; scalings: its s.
    """
    quantised = quantise(x)
    whole = joined(weights)
    if whole is not None:
        made = list(product(quantised, whole).split([weight.shape[0] for weight in weights], dim=1))
    else:
        made = [product(quantised, weight) for weight in weights]
    for y, bias, xa, b, scaling in zip(made, biases, shares, bs, scalings, strict=True):
        add_to(y, add, bias, xa, b, scaling)
    return made


def inputs_gradient(
    dys: Sequence[torch.Tensor], weights: Sequence[FP8], dxa: torch.Tensor | None, a: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """dx of layers of one input, ``[rows, in]``: Σ dy_i·W_i + dxa·a.

    Args:
        dxa: ``[rows, Σ rank]`` and a ``[Σ rank, in]`` of all adapters, or None.
    """
    whole = joined(weights)
    if whole is not None:
        dy = _side_by_side(dys)
        dx = input_gradient(torch.cat(list(dys), dim=1) if dy is None else dy, whole, out)
    else:
        dx = input_gradient(dys[0], weights[0], out)
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx += input_gradient(dy, weight)
    if dxa is not None and a is not None:
        torch.addmm(dx, dxa, a, out=dx)
    return dx


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors that are neighbouring columns of one, as that one."""
    first, columns = parts[0], 0
    for part in parts:
        if part.stride() != (first.stride(0), 1) or part.shape[0] != first.shape[0] or part.dtype != first.dtype:
            return None
        if part.data_ptr() != first.data_ptr() + columns * first.element_size():
            return None
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        columns += part.shape[1]
    if len(parts) > 1 and columns > first.stride(0):
        return None
    return first.as_strided((first.shape[0], columns), first.stride())
