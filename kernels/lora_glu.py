"""A gated unit between LoRA layers, forward and backward, with what its adapters need of the widest tensors.

    g' = g + s_g·xa_g·B_gᵀ      u' = u + s_u·xa_u·B_uᵀ      h = f(g')·u'                          f: see ``glu``

    dg = dh·u'·f'(g')           dB_g = s_g·dgᵀ·xa_g         (u likewise, with du = dh·f(g'))
    dA = dhaᵀ·h

``g`` and ``u`` are the frozen layers' products, ``xa`` the input times A; ``dha`` is the gradient of h·Aᵀ, A being the
down projection's. These products have as few columns to sum over, or to fill, as the adapter has ranks: on tensor
cores they are all but free beside the memory traffic of g, u and h. Done one by one they would read or write those, by
far the widest tensors of a layer, another seven times. Sums are fp32, so g' and u' are never rounded.

Each program's parts of dB and dA are added up in a fixed order, not by atomics: results repeat bit for bit.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .glu import ACTIVATIONS, Activation, _activate
from .launch import INTERPRETED, cdiv, launch, next_power_of_2, processors

#: The largest rank whose factors fit beside the tiles.
MAX_RANK = 64
#: Rows and columns of a tile, and warps of a program; measured on an H200.
_FORWARD = (32, 128, 4)
#: The same of the backward pass by rank, since sums are as many as it has, and the most registers of a thread in 16
#: bits: with 168 three programs share a processor, with more two. In fp32, tiles have half as many columns.
_BACKWARD = {16: (16, 128, 4, 168), 32: (16, 128, 4, 255), 64: (16, 64, 4, 168)}
_STAGES = 3  # of the loop over rows: the next two tiles are on their way while one is worked on
#: Programs that walk down the rows, per processor: twice those that it has at a time, so that few of them are left for
#: the end. More leave more sums.
_WAVES = 6


@triton.jit
def _load(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0)


@triton.jit
def _times(a, b, WIDE: tl.constexpr):
    """a·b with fp32 sums. The interpreter can't multiply 16-bit values, and fp32 ones must not be cut to tf32."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit(do_not_specialize=["n_rows"])
def _forward(
    g_ptr, u_ptr, xa_g_ptr, xa_u_ptr, b_g_ptr, b_u_ptr, h_ptr, n_rows, n_columns, rank,
    g_stride, u_stride, xa_stride, h_stride, s_g, s_u,
    ACTIVATION: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_columns, COLUMNS)
    first_row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    first_column = (tl.program_id(0) % blocks) * COLUMNS
    row, column, place = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, RANK)
    rows, columns, narrow = first_row + row < n_rows, first_column + column < n_columns, place < rank
    inside = rows[:, None] & columns[None, :]
    g = _load(g_ptr + first_row * g_stride + first_column, row[:, None] * g_stride + column[None, :], inside)
    u = _load(u_ptr + first_row * u_stride + first_column, row[:, None] * u_stride + column[None, :], inside)
    at, small = row[:, None] * xa_stride + place[None, :], rows[:, None] & narrow[None, :]
    xa_g = _load(xa_g_ptr + first_row * xa_stride, at, small)
    xa_u = _load(xa_u_ptr + first_row * xa_stride, at, small)
    at, small = column[None, :] * rank + place[:, None], columns[None, :] & narrow[:, None]
    b_g = _load(b_g_ptr + first_column * rank, at, small)
    b_u = _load(b_u_ptr + first_column * rank, at, small)
    gate = _times(xa_g, b_g, WIDE) * s_g + g.to(tl.float32)
    up = _times(xa_u, b_u, WIDE) * s_u + u.to(tl.float32)
    value, _ = _activate(gate, ACTIVATION, g_ptr.dtype.element_ty != tl.float32)
    h = (value * up).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + first_row * h_stride + first_column + row[:, None] * h_stride + column[None, :], h, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "chunk"])
def _backward(
    dh_ptr, g_ptr, u_ptr, xa_g_ptr, xa_u_ptr, b_g_ptr, b_u_ptr, dha_ptr, sums_ptr, n_rows, n_columns, rank, chunk,
    dh_stride, g_stride, u_stride, xa_stride, dha_stride, s_g, s_u,
    ACTIVATION: tl.constexpr, DOWN: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of columns and a piece of the rows, walked down; its part of dB of gate and up, and of dA of down."""
    first_column, part = tl.program_id(0) * COLUMNS, tl.program_id(1).to(tl.int64)
    row, column, place = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, RANK)
    columns, narrow = first_column + column < n_columns, place < rank
    at, small = column[None, :] * rank + place[:, None], columns[None, :] & narrow[:, None]
    b_g = _load(b_g_ptr + first_column * rank, at, small)
    b_u = _load(b_u_ptr + first_column * rank, at, small)
    db_g = tl.zeros([RANK, COLUMNS], tl.float32)
    db_u = tl.zeros([RANK, COLUMNS], tl.float32)
    da = tl.zeros([RANK, COLUMNS], tl.float32)
    thin = row[:, None] * xa_stride + place[None, :]
    # Two products take xa, in layouts of their own, so the compiler does not read it ahead.
    known = (part * chunk + row < n_rows)[:, None] & narrow[None, :]
    xa_g = _load(xa_g_ptr + part * chunk * xa_stride, thin, known)
    xa_u = _load(xa_u_ptr + part * chunk * xa_stride, thin, known)
    for start in range(0, chunk, ROWS):
        first_row = part * chunk + start
        rows = first_row + row < n_rows
        inside = rows[:, None] & columns[None, :]
        g_at = g_ptr + first_row * g_stride + first_column
        u_at = u_ptr + first_row * u_stride + first_column
        g_tile, u_tile = row[:, None] * g_stride + column[None, :], row[:, None] * u_stride + column[None, :]
        known = rows[:, None] & narrow[None, :]
        after = first_row + ROWS
        known_after = (after + row < n_rows)[:, None] & narrow[None, :]
        next_g = _load(xa_g_ptr + after * xa_stride, thin, known_after)
        next_u = _load(xa_u_ptr + after * xa_stride, thin, known_after)
        dh = _load(
            dh_ptr + first_row * dh_stride + first_column, row[:, None] * dh_stride + column[None, :], inside
        ).to(tl.float32)
        gate = _times(xa_g, b_g, WIDE) * s_g + _load(g_at, g_tile, inside).to(tl.float32)
        up = _times(xa_u, b_u, WIDE) * s_u + _load(u_at, u_tile, inside).to(tl.float32)
        value, slope = _activate(gate, ACTIVATION, g_ptr.dtype.element_ty != tl.float32)
        dg = (dh * up * slope).to(g_ptr.dtype.element_ty)
        du = (dh * value).to(g_ptr.dtype.element_ty)
        tl.store(g_at + g_tile, dg, mask=inside)
        tl.store(u_at + u_tile, du, mask=inside)
        db_g += _times(tl.trans(xa_g), dg, WIDE)
        db_u += _times(tl.trans(xa_u), du, WIDE)
        if DOWN:
            dha = _load(dha_ptr + first_row * dha_stride, row[:, None] * dha_stride + place[None, :], known)
            da += _times(tl.trans(dha), (value * up).to(g_ptr.dtype.element_ty), WIDE)
        xa_g, xa_u = next_g, next_u
    sums = sums_ptr + part * (3 * RANK) * n_columns + first_column
    out = place[:, None] * n_columns + column[None, :]
    tl.store(sums + out, db_g * s_g, mask=columns[None, :])
    tl.store(sums + RANK * n_columns + out, db_u * s_u, mask=columns[None, :])
    if DOWN:
        tl.store(sums + 2 * RANK * n_columns + out, da, mask=columns[None, :])


@triton.jit(do_not_specialize=["count"])
def _add_kernel(parts_ptr, out_ptr, n_columns, rank, count, RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """The parts, ``[count, 3, RANK, columns]``, added up: of dB turned, ``[2, columns, rank]``, then of dA as they lie,
    ``[rank, columns]``.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which, place = tl.program_id(1), tl.arange(0, RANK)
    inside = (place < rank)[None, :] & (column < n_columns)[:, None]
    total = tl.zeros([COLUMNS, RANK], tl.float32)
    for part in range(count):
        start = (part * 3 + which).to(tl.int64) * RANK * n_columns
        total += tl.load(parts_ptr + start + place[None, :] * n_columns + column[:, None], mask=inside, other=0.0)
    out = out_ptr + which * rank * n_columns
    if which == 2:
        tl.store(out + place[None, :] * n_columns + column[:, None], total, mask=inside)
    else:
        tl.store(out + column[:, None] * rank + place[None, :], total, mask=inside)


@dataclass(frozen=True)
class Gradients:
    """Of the adapters' outer factors, in fp32: db ``[columns, rank]`` each; da_down ``[rank, columns]`` or None."""

    db_gate: torch.Tensor
    db_up: torch.Tensor
    da_down: torch.Tensor | None


def forward(
    g: torch.Tensor, u: torch.Tensor, xa: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor],
    scalings: tuple[float, float], activation: Activation,
) -> torch.Tensor:  # fmt: skip
    """h, ``[rows, columns]``.

    Args:
        g, u: ``[rows, columns]``, columns side by side.
        xa: two of ``[rows, rank]`` with one row stride (shares of one product); b: two of ``[columns, rank]``.
    """
    (n_rows, n_columns), rank = g.shape, _rank(xa, b)
    rows, columns, warps = (16, 32, 4) if INTERPRETED else _FORWARD
    h = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    launch(
        _forward, (cdiv(n_rows, rows) * cdiv(n_columns, columns),), (g, u, *xa, *b, h),
        (n_rows, n_columns, rank, g.stride(0), u.stride(0), xa[0].stride(0), h.stride(0), *scalings),
        (ACTIVATIONS.index(activation), _padded(rank), INTERPRETED or g.dtype == torch.float32, rows, columns),
        num_warps=warps,
    )  # fmt: skip
    return h


def backward(
    dh: torch.Tensor, g: torch.Tensor, u: torch.Tensor, xa: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor], scalings: tuple[float, float], activation: Activation,
    dha: torch.Tensor | None = None,
) -> Gradients:  # fmt: skip
    """g and u become the gradients of the two layers' outputs, in place; dh stays.

    Args:
        dha: ``[rows, rank]``, the gradient of h·Aᵀ; None if the down projection has no adapter.
    """
    (n_rows, n_columns), rank = g.shape, _rank(xa, b)
    assert dha is None or dha.shape[1] == rank
    padded = _padded(rank)
    rows, columns, warps, registers = (16, 32, 4, 0) if INTERPRETED else _BACKWARD[padded]
    wide = INTERPRETED or g.dtype == torch.float32
    if g.dtype == torch.float32 and not INTERPRETED:
        columns //= 2
    limits = {} if wide or torch.version.hip is not None else {"maxnreg": registers}
    blocks = cdiv(n_columns, columns)
    pieces = min(cdiv(n_rows, rows), max(1, _WAVES * processors(g.device) // blocks))
    length = cdiv(cdiv(n_rows, pieces), rows) * rows
    pieces = cdiv(n_rows, length)
    sums = torch.empty(pieces, 3, padded, n_columns, dtype=torch.float32, device=g.device)
    which = 2 if dha is None else 3
    made = torch.empty(which, n_columns, rank, dtype=torch.float32, device=g.device)
    down = dh if dha is None else dha
    strides = dh.stride(0), g.stride(0), u.stride(0), xa[0].stride(0), down.stride(0)
    launch(
        _backward, (blocks, pieces), (dh, g, u, *xa, *b, down, sums),
        (n_rows, n_columns, rank, length, *strides, *scalings),
        (ACTIVATIONS.index(activation), dha is not None, padded, wide, rows, columns),
        num_warps=warps, num_stages=_STAGES, **limits,
    )  # fmt: skip
    sizes = n_columns, rank, pieces
    launch(_add_kernel, (cdiv(n_columns, 64), which), (sums, made), sizes, (padded, 64), num_warps=4)
    db_gate, db_up, *da = made.unbind()
    return Gradients(db_gate, db_up, da[0].view(rank, n_columns) if da else None)


def _padded(rank: int) -> int:
    return max(16, next_power_of_2(rank))


def _rank(xa: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> int:
    rank = b[0].shape[1]
    assert b[1].shape[1] == rank <= MAX_RANK
    assert xa[0].stride(0) == xa[1].stride(0)
    assert b[0].is_contiguous()
    assert b[1].is_contiguous()
    return int(rank)
