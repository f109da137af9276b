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

#: Rows and columns of a tile, and warps, where y is read and where it is not; measured on an H200.
_READ, _NEW = (64, 128, 4), (32, 128, 4)
#: The largest rank whose factors fit beside the tiles.
MAX_RANK = 128


@triton.jit(do_not_specialize=["n_rows"])
def _kernel(
    y_ptr, add_ptr, bias_ptr, xa_ptr, b_ptr, n_rows, n_columns, rank, y_stride, add_stride, xa_stride, scaling,
    KEEP: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, RANK: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    at = y_ptr + row[:, None] * y_stride + column[None, :]
    if KEEP:
        y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        y = tl.zeros([ROWS, COLUMNS], tl.float32)
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
        if WIDE:  # the interpreter can't multiply 16-bit values, and fp32 ones must not be cut to tf32
            y += tl.dot(small.to(tl.float32), b.to(tl.float32), input_precision="ieee") * scaling
        else:
            y += tl.dot(small, b) * scaling
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
    tile_rows, tile_columns, warps = (16, 32, 4) if INTERPRETED else _READ if keep else _NEW
    launch(
        _kernel, (cdiv(rows, tile_rows), cdiv(columns, tile_columns)),
        (y, y if add is None else add, y if bias is None else bias, xa if xa is not None and rank else y,
         b if b is not None and rank else y),
        (rows, columns, rank, y.stride(0), 0 if add is None else add.stride(0), xa_stride, float(scaling)),
        (keep, add is not None, bias is not None, rank > 0, max(16, next_power_of_2(rank)),
         INTERPRETED or y.dtype == torch.float32, tile_rows, tile_columns),
        num_warps=warps,
    )  # fmt: skip
