"""A gated unit whose inputs still lack their LoRA products: those are made in registers, and never written.

    h = f(g + s_g·xa_g·B_gᵀ) · (u + s_u·xa_u·B_uᵀ)          f: see ``glu``

``g`` and ``u`` are the frozen layers' products, ``xa`` the input times A. The products with B have as few columns to
sum over as the adapter has ranks, so on tensor cores they are free beside the memory traffic of g, u and h; done by
themselves they would read and write g and u once more each way. They are added in fp32, which rounds once less than
separate products do.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .glu import ACTIVATIONS, Activation, _activate
from .launch import INTERPRETED, next_power_of_2, on

#: The largest rank whose factors fit beside the tiles.
MAX_RANK = 64
_ROWS, _COLUMNS, _WARPS = 64, 64, 8


@triton.jit
def _product(xa_ptr, b_ptr, row, column, n_rows, n_columns, rank, xa_stride, scaling, RANK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip # noqa: E501
    """s·xa·Bᵀ of one tile, in fp32."""
    place = tl.arange(0, RANK)
    small = tl.load(
        xa_ptr + row[:, None] * xa_stride + place[None, :],
        mask=(row < n_rows)[:, None] & (place < rank)[None, :], other=0.0,
    )  # fmt: skip
    b = tl.load(
        b_ptr + column[None, :] * rank + place[:, None],
        mask=(column < n_columns)[None, :] & (place < rank)[:, None], other=0.0,
    )  # fmt: skip
    if WIDE:  # the interpreter can't multiply 16-bit values, and fp32 ones must not be cut to tf32
        return tl.dot(small.to(tl.float32), b.to(tl.float32), input_precision="ieee") * scaling
    return tl.dot(small, b) * scaling


@triton.jit(do_not_specialize=["n_rows"])
def _forward(
    g_ptr, u_ptr, xa_g_ptr, xa_u_ptr, b_g_ptr, b_u_ptr, h_ptr, n_rows, n_columns, rank,
    g_stride, u_stride, xa_stride, h_stride, s_g, s_u,
    ACTIVATION: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    g = tl.load(g_ptr + row[:, None] * g_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row[:, None] * u_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    g += _product(xa_g_ptr, b_g_ptr, row, column, n_rows, n_columns, rank, xa_stride, s_g, RANK, WIDE)
    u += _product(xa_u_ptr, b_u_ptr, row, column, n_rows, n_columns, rank, xa_stride, s_u, RANK, WIDE)
    value, _ = _activate(g, ACTIVATION)
    tl.store(h_ptr + row[:, None] * h_stride + column[None, :], (value * u).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _backward(
    dh_ptr, g_ptr, u_ptr, xa_g_ptr, xa_u_ptr, b_g_ptr, b_u_ptr, n_rows, n_columns, rank,
    dh_stride, g_stride, u_stride, xa_stride, s_g, s_u,
    ACTIVATION: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    dh_at = dh_ptr + row[:, None] * dh_stride + column[None, :]
    g_at = g_ptr + row[:, None] * g_stride + column[None, :]
    u_at = u_ptr + row[:, None] * u_stride + column[None, :]
    dh = tl.load(dh_at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_at, mask=inside, other=0.0).to(tl.float32)
    g += _product(xa_g_ptr, b_g_ptr, row, column, n_rows, n_columns, rank, xa_stride, s_g, RANK, WIDE)
    u += _product(xa_u_ptr, b_u_ptr, row, column, n_rows, n_columns, rank, xa_stride, s_u, RANK, WIDE)
    value, slope = _activate(g, ACTIVATION)
    tl.store(g_at, (dh * u * slope).to(g_ptr.dtype.element_ty), mask=inside)
    tl.store(u_at, (dh * value).to(u_ptr.dtype.element_ty), mask=inside)
    tl.store(dh_at, (value * u).to(dh_ptr.dtype.element_ty), mask=inside)


def _grid(rows: int, columns: int) -> tuple[tuple[int, int], int, int]:
    tile_rows, tile_columns = (16, 32) if INTERPRETED and rows < 64 else (_ROWS, _COLUMNS)
    return (triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns)), tile_rows, tile_columns


def _check(xa: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> int:
    rank = b[0].shape[1]
    assert b[1].shape[1] == rank <= MAX_RANK
    assert xa[0].stride(0) == xa[1].stride(0)
    assert b[0].is_contiguous() and b[1].is_contiguous()  # noqa: PT018
    return int(rank)


def forward(
    g: torch.Tensor, u: torch.Tensor, xa: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor],
    scalings: tuple[float, float], activation: Activation,
) -> torch.Tensor:  # fmt: skip
    """h, ``[rows, columns]``.

    Args:
        g, u: ``[rows, columns]``, columns side by side.
        xa: two of ``[rows, rank]`` with one row stride (shares of one product); b: two of ``[columns, rank]``.
    """
    rank = _check(xa, b)
    h = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    grid, rows, columns = _grid(*g.shape)
    with on(g):
        _forward[grid](
            g, u, *xa, *b, h, *g.shape, rank, g.stride(0), u.stride(0), xa[0].stride(0), h.stride(0), *scalings,
            ACTIVATION=ACTIVATIONS.index(activation), RANK=max(16, next_power_of_2(rank)),
            WIDE=INTERPRETED or g.dtype == torch.float32, ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
        )  # fmt: skip
    return h


def backward(
    dh: torch.Tensor, g: torch.Tensor, u: torch.Tensor, xa: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor], scalings: tuple[float, float], activation: Activation,
) -> None:  # fmt: skip
    """Everything in place: g and u become the gradients of the two layers' outputs, dh becomes h."""
    rank = _check(xa, b)
    grid, rows, columns = _grid(*g.shape)
    with on(g):
        _backward[grid](
            dh, g, u, *xa, *b, *g.shape, rank, dh.stride(0), g.stride(0), u.stride(0), xa[0].stride(0), *scalings,
            ACTIVATION=ACTIVATIONS.index(activation), RANK=max(16, next_power_of_2(rank)),
            WIDE=INTERPRETED or g.dtype == torch.float32, ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
        )  # fmt: skip
