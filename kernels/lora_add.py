"""What a LoRA adapter, a bias and a residual add to a product, in one pass over it.

    y = [y +] add + bias + s·xa·Bᵀ                       xa: the input times Aᵀ

xa·Bᵀ sums over as few values as the adapter has ranks: on tensor cores it is all but free beside the memory traffic.
After a product that can't add to what is there (one in 8 bits), y is its result. Before one that can, y is new: a
library's product would copy ``add`` to y, and read and write that again for the adapter.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, cdiv, launch, next_power_of_2

#: Rows and columns of a tile, and warps, where y is read and where it is not; measured on an H200. Tiles of 32 columns
#: need no shared memory for y (see :func:`_column`) but go through memory in smaller pieces: where one tensor more is
#: read they are slower.
_READ, _NEW = (64, 128, 4), (128, 32, 4)
#: The largest rank whose factors fit beside the tiles.
MAX_RANK = 128


@triton.jit
def _row(i, WARPS: tl.constexpr):
    """Which row of a tile the i-th of the product is: 16·WARPS·r + 16·w + 8·h + l stands for 16·WARPS·r + 8·WARPS·h +
    8·w + l. See :func:`_column`.
    """
    within = i % (16 * WARPS)
    return i - within + ((within >> 3) & 1) * (8 * WARPS) + (within >> 4) * 8 + (i & 7)


@triton.jit
def _column(i):
    """Which column of a tile the i-th of the product is: 8·j + 2·t + e stands for 8·t + 2·j + e.

    A matrix unit leaves each thread two neighbours of every eight columns (PTX ISA, fragments of ``mma.m16n8k16``),
    memory wants eight neighbours. With factors read in this order, what a thread gets of 32 columns are eight that lie
    side by side; and with rows likewise, its warp gets what it reads and stores. Otherwise both go through shared
    memory, where all warps wait for each other.
    """
    return ((i >> 1) & 3) * 8 + (i >> 3) * 2 + (i & 1)


@triton.jit
def _in_order(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """A product of factors in the orders of :func:`_row` and :func:`_column`, as the tile lies in memory."""
    product = tl.permute(tl.reshape(product, [ROWS // (16 * WARPS), WARPS, 2, 8 * COLUMNS]), (0, 2, 1, 3))
    product = tl.permute(tl.reshape(product, [ROWS, 4, 4, 2]), (0, 2, 1, 3))
    return tl.reshape(product, [ROWS, COLUMNS])


@triton.jit(do_not_specialize=["n_rows"])
def _kernel(
    y_ptr, add_ptr, bias_ptr, xa_ptr, b_ptr, n_rows, n_columns, rank, y_stride, add_stride, xa_stride, scaling,
    KEEP: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, RANK: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    DIRECT: tl.constexpr = COLUMNS == 32
    first_row = tl.program_id(1 if DIRECT else 0).to(tl.int64) * ROWS
    first_column = tl.program_id(0 if DIRECT else 1) * COLUMNS
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    at = y_ptr + row[:, None] * y_stride + column[None, :]
    if LORA:
        place = tl.arange(0, RANK)
        row_there = first_row + _row(tl.arange(0, ROWS), WARPS) if DIRECT else row
        column_there = first_column + _column(tl.arange(0, COLUMNS)) if DIRECT else column
        # Beyond the last rank lie the neighbour's values, which a zero of the other factor would not cancel if NaN.
        small = tl.load(
            xa_ptr + row_there[:, None] * xa_stride + place[None, :],
            mask=(row_there < n_rows)[:, None] & (place < rank)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + column_there[None, :] * rank + place[:, None],
            mask=(column_there < n_columns)[None, :] & (place < rank)[:, None], other=0.0,
        )  # fmt: skip
    if KEEP:
        y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        y = tl.zeros([ROWS, COLUMNS], tl.float32)
    if ADD:
        y += tl.load(add_ptr + row[:, None] * add_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < n_columns, other=0.0).to(tl.float32)[None, :]
    if LORA:
        if WIDE:  # the interpreter can't multiply 16-bit values, and fp32 ones must not be cut to tf32
            product = tl.dot(small.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        else:
            product = tl.dot(small, b)
        y += (_in_order(product, ROWS, COLUMNS, WARPS) if DIRECT else product) * scaling
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


def add_to(
    y: torch.Tensor, add: torch.Tensor | None, bias: torch.Tensor | None, xa: torch.Tensor | None,
    b: torch.Tensor | None, scaling: float, *, keep: bool = True,
) -> None:  # fmt: skip
    """y += add + bias + s·xa·bᵀ in one pass; what is None is left out.

    Args:
        y: ``[rows, columns]``, columns side by side; add likewise; bias ``[columns]``.
        xa: ``[rows, rank]``, rank side by side; b: ``[columns, rank]``, contiguous.
        keep: what is in y is part of the sum; else it is not looked at, and ``add`` is there.
    """
    assert keep or add is not None
    if xa is not None and b is not None and b.shape[1] > MAX_RANK:
        if not keep and add is not None:
            y.copy_(add)
            add, keep = None, True
        torch.addmm(y, xa, b.t(), alpha=scaling, out=y)
        xa = None
    rank, xa_stride = (b.shape[1], xa.stride(0)) if xa is not None and b is not None else (0, 0)
    if (add is None and bias is None and not rank) or not y.numel():
        return
    rows, columns = y.shape
    tile_rows, tile_columns, warps = _READ if keep else _NEW
    down, across = cdiv(rows, tile_rows), cdiv(columns, tile_columns)
    launch(
        _kernel, (across, down) if tile_columns == 32 else (down, across),
        (y, y if add is None else add, y if bias is None else bias, xa if xa is not None and rank else y,
         b if b is not None and rank else y),
        (rows, columns, rank, y.stride(0), 0 if add is None else add.stride(0), xa_stride, float(scaling)),
        (keep, add is not None, bias is not None, rank > 0, max(16, next_power_of_2(rank)),
         INTERPRETED or y.dtype == torch.float32, tile_rows, tile_columns, warps),
        num_warps=warps,
    )  # fmt: skip
