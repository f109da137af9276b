"""RMSNorm, with the residual addition before it if there is one.

    s = x + residual                          (rounded to x's dtype, as the residual stream is)
    n = s · r,   r = 1 / sqrt(mean(s²) + eps)    per row, in fp32
    y = n · w                                  with the roundings of the model's own code (``Form``)

    g  = dy · w
    ds = r · (g − n · mean(g · n))  [+ the gradient of s]
    dw = Σ_rows dy · n

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467. ``r`` is the only thing saved
besides the row itself: 4 bytes. The gradient is computed in fp32 throughout, so it is rounded once.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import as_rows, cdiv, launch, processors, row_tile

#: Where the model's own code rounds. ``cast-first``: n to x's dtype, then times w (Llama, Mistral, Qwen);
#: ``cast-last``: n·w in fp32, then to x's dtype (OLMo 2, torch.nn.RMSNorm); ``one-plus``: n·(1 + w) in fp32, then to
#: x's dtype (Gemma).
Form = Literal["cast-first", "cast-last", "one-plus"]
FORMS: tuple[Form, ...] = get_args(Form)

_PROGRAMS = 2  # per processor where the weight is trained: each leaves one row of partial sums
#: Tiles of such a program that are on their way while one is worked on, and what they may take of shared memory: two
#: programs share the 100 KiB of an Ada processor; a wide row's has one to itself.
_AHEAD, _AHEAD_BYTES, _ALONE_BYTES = 2, 48 * 1024, 96 * 1024
_CAST_FIRST = tl.constexpr(0)
_ONE_PLUS = tl.constexpr(2)


@triton.jit(do_not_specialize=["n_rows"])
def _forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,
    n_rows, n_columns, x_stride, residual_stride, eps,
    FORM: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    packed = row[:, None] * n_columns + column[None, :]

    value = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if ADD:
        other = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + packed, value, mask=inside)
    value = value.to(tl.float32)

    # Inductor hands Python floats over as fp64; without the cast the whole row would follow.
    rstd = 1.0 / tl.sqrt((tl.sum(value * value, axis=1) / n_columns + eps).to(tl.float32))
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    weight = tl.load(weight_ptr + column, mask=column < n_columns, other=0.0).to(tl.float32)
    normed = value * rstd[:, None]
    if FORM == _CAST_FIRST:
        normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
    if FORM == _ONE_PLUS:
        weight += 1.0
    tl.store(y_ptr + packed, (normed * weight[None, :]).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _backward(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr,
    n_rows, n_columns, dy_stride, dsum_stride, x_stride,
    FORM: tl.constexpr, ADD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < n_columns, other=0.0).to(tl.float32)
    if FORM == _ONE_PLUS:
        weight += 1.0
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    # With a frozen weight there is one program per tile and this loop runs once; else the next tiles are on their way
    # through shared memory while this one is worked on, whose registers are full.
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0.0)
        normed = x * rstd[:, None]
        scaled = dy * weight[None, :]
        dx = rstd[:, None] * (scaled - normed * (tl.sum(scaled * normed, axis=1) / n_columns)[:, None])
        if ADD:
            dsum_at = row[:, None] * dsum_stride + column[None, :]
            dx += tl.load(dsum_ptr + dsum_at, mask=inside, other=0.0).to(tl.float32)
        packed = row[:, None] * n_columns + column[None, :]
        tl.store(dx_ptr + packed, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT_GRAD:
            if FORM == _CAST_FIRST:
                normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
            dweight += tl.sum(dy * normed, axis=0)
    if WEIGHT_GRAD:
        at = tl.program_id(0).to(tl.int64) * n_columns + column
        tl.store(dweight_ptr + at, dweight, mask=column < n_columns)


@triton.jit
def _sum_rows(partial_ptr, out_ptr, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns' sums, always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, n_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        total += tl.load(partial_ptr + row[:, None] * n_columns + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < n_columns)


def forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, form: Form, residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The forward pass without autograd, for larger fused functions.

    Args:
        dtype: of y, where it is rounded further, as for a product in 16 bits.

    Returns:
        ``(y, s, rstd)``: y like x (in the wider of the two dtypes for ``cast-first``, as PyTorch promotes), s as
        ``[rows, columns]`` (x itself without a residual), rstd ``[rows]`` in fp32.
    """
    columns = x.shape[-1]
    if weight.shape != (columns,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {columns} columns")
    rows = as_rows(x)
    other = as_rows(residual) if residual is not None else rows
    n_rows = rows.shape[0]
    if dtype is None:
        dtype = torch.promote_types(x.dtype, weight.dtype) if form == "cast-first" else x.dtype
    y = torch.empty(rows.shape, dtype=dtype, device=x.device)
    total = torch.empty(rows.shape, dtype=x.dtype, device=x.device) if residual is not None else rows
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    tile_rows, block, warps = row_tile(columns)
    if n_rows:
        launch(
            _forward, (cdiv(n_rows, tile_rows),), (rows, other, weight, y, total, rstd),
            (n_rows, columns, rows.stride(0), other.stride(0), float(eps)),
            (FORMS.index(form), residual is not None, tile_rows, block), num_warps=warps,
        )  # fmt: skip
    return y if rows is x else y.view(x.shape), total, rstd


def backward(
    dy: torch.Tensor, dsum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor,
    form: Form, *, weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Gradients of :func:`forward` with respect to s (shaped like ``dy``) and, if asked for, to the weight."""
    columns = x.shape[-1]
    dy_rows = as_rows(dy)
    dsum_rows = as_rows(dsum) if dsum is not None else dy_rows
    n_rows = x.shape[0]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile_rows, block, warps = row_tile(columns)
    tiles = cdiv(n_rows, tile_rows)
    programs = min(tiles, _PROGRAMS * processors(x.device)) if weight_grad else tiles
    tensors = (x, dy_rows) if dsum is None else (x, dy_rows, dsum_rows)
    stages = _stages(tile_rows * block * sum(t.element_size() for t in tensors)) if weight_grad else 1
    # Partial sums are added in a fixed order afterwards, so that the weight's gradient is repeatable.
    partial = torch.empty((programs, columns), dtype=torch.float32, device=x.device) if weight_grad else rstd
    if n_rows:
        launch(
            _backward, (programs,), (dy_rows, dsum_rows, x, weight, rstd, dx, partial),
            (n_rows, columns, dy_rows.stride(0), dsum_rows.stride(0), x.stride(0)),
            (FORMS.index(form), dsum is not None, weight_grad, tile_rows, block, stages), num_warps=warps,
        )  # fmt: skip
    if dy_rows is not dy:
        dx = dx.view(dy.shape)
    if not weight_grad:
        return dx, None
    dweight = torch.empty(columns, dtype=weight.dtype, device=x.device)
    launch(_sum_rows, (cdiv(columns, 32),), (partial, dweight), (programs, columns), (128, 32), num_warps=8)
    return dx, dweight


def _stages(tile_bytes: int) -> int:
    """Of the loop over tiles: one that is worked on, and those that are read ahead."""
    return 1 + min(_AHEAD, max(_AHEAD_BYTES // tile_bytes, int(tile_bytes <= _ALONE_BYTES)))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, form: Form) -> torch.Tensor:
        y, rows, rstd = forward(x, weight, eps, form)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.form = form
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, rstd = ctx.saved_tensors
        dx, dweight = backward(dy, None, rows, weight, rstd, ctx.form, weight_grad=ctx.needs_input_grad[1])
        return dx, dweight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, form: Form
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total, rstd = forward(x, weight, eps, form, residual)
        ctx.save_for_backward(total, weight, rstd)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return y, total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:  # the normed output was not used
            return dsum, dsum, None, None, None
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = backward(dy, dsum, total, weight, rstd, ctx.form, weight_grad=ctx.needs_input_grad[2])
        return dx, dx, dweight, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, form: Form = "cast-first") -> torch.Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: ``[..., columns]`` in bf16, fp16 or fp32, any strides.
        weight: ``[columns]``; its gradient is computed only if it is asked for.
        form: where to round; see :data:`Form`.
    """
    return _RMSNorm.apply(x, weight, eps, form)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, form: Form = "cast-first"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(norm(x + residual), x + residual)`` in one pass: 8 bytes per bf16 value instead of 14."""
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError("x and residual differ in shape or dtype")
    return _AddRMSNorm.apply(x, residual, weight, eps, form)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, form: Form = "cast-first") -> torch.Tensor:
    """The same in plain PyTorch, as models write it; float64 in gives float64 arithmetic."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == "cast-first":
        return weight * normed.to(x.dtype)
    if form == "cast-last":
        return (weight * normed).to(x.dtype)
    return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
