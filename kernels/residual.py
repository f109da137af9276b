"""The norms around a sublayer f, and how what it makes joins the residual stream: forward and backward by hand.

    n = norm_before(x)      o = f(n)      s = x + m·norm_after(o)

    do = m · (gradient of norm_after)(ds)          dx = ds + (gradient of norm_before)(dn)

A layer has the first norm (Llama), the second (OLMo 2) or both (Gemma 2 and 3); m is Granite's residual multiplier.
Where nothing stands between o and the sum, the product that makes o adds to x itself. Else o is read once more:

    s = x + m · o · r · w,    r = 1 / sqrt(mean(o²) + eps)        per row, in fp32

in one pass, with the roundings of the norm's :data:`.rms_norm.Form`. The gradient of the second norm needs o and r: o
may be kept in place of s, which this pass makes again from x and o.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import rms_norm
from .launch import launch, row_tile
from .projection import Group, project

_CAST_FIRST = tl.constexpr(0)
_ONE_PLUS = tl.constexpr(2)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm. ``trained``: its weight is."""

    weight: torch.Tensor
    eps: float
    form: rms_norm.Form
    trained: bool = False


@dataclass(frozen=True)
class Join:
    """What stands between a sublayer's output and the sum: a norm, and a factor."""

    norm: Norm | None = None
    scale: float = 1.0


class Joined(NamedTuple):
    """The sum, ``[rows, hidden]``; o and r where there is a norm after the sublayer."""

    s: torch.Tensor
    o: torch.Tensor | None = None
    rstd: torch.Tensor | None = None


def normed(rows: torch.Tensor, norm: Norm | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The normed rows in ``dtype``, and 1 / root mean square of each; without a norm the rows, themselves if they can.

    Whoever writes over what this returns has to see that it is not what was given.
    """
    if norm is None:
        return rows.to(dtype), None
    y, _, rstd = rms_norm.forward(rows, norm.weight, norm.eps, norm.form, dtype=dtype)
    return y, rstd


def normed_gradient(
    dn: torch.Tensor, ds: torch.Tensor, x: torch.Tensor, norm: Norm | None, rstd: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx, in the dtype of x, and the gradient of the norm's weight if it is trained. May write over ``dn``."""
    if norm is None or rstd is None:
        return (dn.add_(ds) if dn.dtype == ds.dtype else ds + dn), None
    return rms_norm.backward(dn, ds, x, norm.weight, rstd, norm.form, weight_grad=norm.trained)


def join(
    x: torch.Tensor, h: torch.Tensor, ha: torch.Tensor | None, group: Group, how: Join,
    weights: Sequence[Any] | None = None, *, out: torch.Tensor | None = None,
) -> Joined:  # fmt: skip
    """x and what the last projection of a sublayer makes of h.

    Args:
        x: ``[rows, hidden]``; h: ``[rows, in]``, and ``ha`` its product with the adapter's A.
        group: that projection alone; weights: as :func:`.projection.dense` gives it.
        out: where the sum is written; it may be x.
    """
    if how.norm is None and how.scale == 1.0:
        return Joined(*project(h, ha, group, weights, add=x, out=out))
    (o,) = project(h, ha, group, weights)
    if how.norm is None:
        return Joined(torch.add(x, o, alpha=how.scale, out=out))
    return join_again(x, o, how, out=out)


def join_again(x: torch.Tensor, o: torch.Tensor, how: Join, *, out: torch.Tensor | None = None) -> Joined:
    """The sum, from what a norm stands after; ``out`` may be x."""
    norm = how.norm
    assert norm is not None
    n_rows, columns = o.shape
    out = torch.empty_like(x) if out is None else out
    rstd = torch.empty(n_rows, dtype=torch.float32, device=o.device)
    rows, block, warps = row_tile(columns)
    if n_rows:
        launch(
            _add_normed, (triton.cdiv(n_rows, rows),), (x, o, norm.weight, out, rstd),
            (n_rows, columns, x.stride(0), o.stride(0), out.stride(0), float(norm.eps), float(how.scale)),
            (rms_norm.FORMS.index(norm.form), rows, block), num_warps=warps,
        )  # fmt: skip
    return Joined(out, o, rstd)


def join_gradient(
    ds: torch.Tensor, o: torch.Tensor | None, rstd: torch.Tensor | None, how: Join, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """do in ``dtype``, and the gradient of the norm's weight if it is trained."""
    if how.norm is None or o is None or rstd is None:
        return (ds.to(dtype) if how.scale == 1.0 else (ds * how.scale).to(dtype)), None
    norm = how.norm
    do, dnorm = rms_norm.backward(ds, None, o, norm.weight, rstd, norm.form, weight_grad=norm.trained)
    if how.scale != 1.0:
        do, dnorm = do.mul_(how.scale), dnorm if dnorm is None else dnorm.mul_(how.scale)
    return do, dnorm


@triton.jit(do_not_specialize=["n_rows"])
def _add_normed(
    x_ptr, o_ptr, weight_ptr, sum_ptr, rstd_ptr,
    n_rows, n_columns, x_stride, o_stride, sum_stride, eps, scale,
    FORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every load stands before every store, so the sum may be written over x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    o = tl.load(o_ptr + row[:, None] * o_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < n_columns, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt((tl.sum(o * o, axis=1) / n_columns + eps).to(tl.float32))
    normed = o * rstd[:, None]
    if FORM == _CAST_FIRST:
        normed = normed.to(o_ptr.dtype.element_ty).to(tl.float32)
    if FORM == _ONE_PLUS:
        weight += 1.0
    total = x + (normed * weight[None, :] * scale).to(tl.float32)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    tl.store(sum_ptr + row[:, None] * sum_stride + column[None, :], total.to(sum_ptr.dtype.element_ty), mask=inside)
