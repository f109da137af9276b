"""Projections whose frozen weights are multiplied in e4m3; the counterpart of :mod:`.projection` for such a group.

    y_i = x·W_iᵀ + b_i + s_i·(x·A_iᵀ)·B_iᵀ (+ a residual)          dx = Σ_i dXA_i·A_i + dy·W

Layers of one input share its quantised copy, and where their weights lie side by side they are one product each way.
An 8-bit product can't add to what is there, so what LoRA, bias and residual add is one pass over the product: its sums
have as few terms as the adapter has ranks, so on tensor cores they are free beside the memory traffic.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .fp8 import FP8, input_gradient, joined, product, quantise
from .launch import INTERPRETED, next_power_of_2, on

_ROWS, _COLUMNS = 64, 64


@triton.jit(do_not_specialize=["n_rows"])
def _add_kernel(
    y_ptr, add_ptr, bias_ptr, xa_ptr, b_ptr, n_rows, n_columns, rank, y_stride, add_stride, xa_stride, scaling,
    ADD: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    at = y_ptr + row[:, None] * y_stride + column[None, :]
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(add_ptr + row[:, None] * add_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < n_columns, other=0.0).to(tl.float32)[None, :]
    if LORA:
        place = tl.arange(0, RANK)
        # Beyond the last rank lie the neighbour's values, which a zero of the other factor would not cancel if NaN.
        small = tl.load(
            xa_ptr + row[:, None] * xa_stride + place[None, :],
            mask=(row < n_rows)[:, None] & (place < rank)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + column[None, :] * rank + place[:, None],
            mask=(column < n_columns)[None, :] & (place < rank)[:, None], other=0.0,
        )  # fmt: skip
        if WIDE:  # the interpreter can't multiply 16-bit values
            y += tl.dot(small.to(tl.float32), b.to(tl.float32), input_precision="ieee") * scaling
        else:
            y += tl.dot(small, b) * scaling
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


#: The largest rank whose factors fit beside the tiles.
MAX_RANK = 128


def add_to(
    y: torch.Tensor, add: torch.Tensor | None, bias: torch.Tensor | None, xa: torch.Tensor | None,
    b: torch.Tensor | None, scaling: float,
) -> None:  # fmt: skip
    """y += add + bias + s·xa·bᵀ in one pass; what is None is left out.

    Args:
        y: ``[rows, columns]``, columns side by side; add likewise; bias ``[columns]``.
        xa: ``[rows, rank]``, rank side by side; b: ``[columns, rank]``, contiguous.
    """
    if xa is not None and b is not None and b.shape[1] > MAX_RANK:
        torch.addmm(y, xa, b.t(), alpha=scaling, out=y)
        xa = None
    rank, xa_stride = (b.shape[1], xa.stride(0)) if xa is not None and b is not None else (0, 0)
    if (add is None and bias is None and not rank) or not y.numel():
        return
    rows, columns = y.shape
    tile_rows, tile_columns = (16, 32) if INTERPRETED else (_ROWS, _COLUMNS)
    with on(y):
        _add_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))](
            y, y if add is None else add, y if bias is None else bias, xa if rank else y, b if rank else y,
            rows, columns, rank, y.stride(0), 0 if add is None else add.stride(0), xa_stride, scaling,
            ADD=add is not None, BIAS=bias is not None, LORA=rank > 0, RANK=max(16, next_power_of_2(rank)),
            WIDE=INTERPRETED, ROWS=tile_rows, COLUMNS=tile_columns, num_warps=8,
        )  # fmt: skip


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
