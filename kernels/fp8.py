"""Frozen weights in e4m3 with a scale per row, multiplied in 8 bits by inputs and gradients quantised on the way.

    W ≈ diag(s)·Q        s_n: max_k |W_nk| / 448, up to a power of two      Q, and all that is marked q, in e4m3
    y  = x·Wᵀ:    x ≈ diag(a)·x_q          y  = diag(a)·(x_q·Qᵀ)·diag(s)
    dx = dy·W:    dy·diag(s) ≈ diag(b)·g_q     dx = diag(b)·(g_q·Q)

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433; one scale per row of both operands as
in ``torch._scaled_mm``. The sum of dx runs over the rows of W, whose scales could not be taken out of it: they are
multiplied into dy before that is quantised. Powers of two lose nothing there, nor where a weight is turned back to 16
bits, and e4m3 has exponents to spare. The matrix units of Ada and Hopper read both operands of an 8-bit product along
the summed dimension, so for dx the bytes of W are transposed, into memory that all layers share: that moves 2 bytes
per weight where a second copy would keep one more for good.

Elsewhere (an older GPU, sides that are no multiples of 16) the weight alone is in 8 bits and is multiplied in the dtype
of its input.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import once_differentiable

from . import selfcheck
from .launch import INTERPRETED, MAX_COLUMNS, as_rows, cdiv, launch, row_tile
from .nf4 import scratch

E4M3 = torch.float8_e4m3fn
#: The largest value of e4m3.
LARGEST = 448.0
_SIDE = 16  # the matrix units take multiples of this
_TILE = 128  # of the transposition, both ways
#: Rows wider than this are quantised piece by piece, in two passes, instead of being held whole: a row of 28,672 values
#: fills a processor's registers by itself, and it then computes and waits for memory in turns.
_WHOLE = 16384
_PIECE, _PIECE_WARPS = 8192, 16


@dataclass(frozen=True)
class FP8:
    """A quantised weight.

    Args:
        data: ``[out, in]``, e4m3 as uint8: no library takes bytes for something to be cast or trained.
        scale: ``[out]``, fp32.
        dtype: of the weight as it was.
    """

    data: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.data.shape


@dataclass(frozen=True)
class Quantised:
    """Rows in e4m3: ``data`` ``[rows, columns]``, ``scale`` ``[rows]`` in fp32."""

    data: torch.Tensor
    scale: torch.Tensor


@triton.jit(do_not_specialize=["n_rows"])
def _quantise_kernel(
    x_ptr, fold_ptr, q_ptr, scale_ptr, n_rows, n_columns, x_stride,
    FOLD: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if FOLD:
        x *= tl.load(fold_ptr + column, mask=column < n_columns, other=0.0).to(tl.float32)[None, :]
    # A row of zeros has a scale like any other. The factor is a power of two away from the format's limits.
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30) * (1.0 / 448.0)
    if POWER:  # the next power of two: an exponent more, unless there is no mantissa
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, scale, mask=row < n_rows)
    x *= (1.0 / scale)[:, None]  # 448 but for its last bits, which the format does not have
    tl.store(q_ptr + row[:, None] * n_columns + column[None, :], x.to(q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _quantise_pieces_kernel(
    x_ptr, fold_ptr, q_ptr, scale_ptr, n_columns, x_stride,
    FOLD: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same, one row per program and a few thousand values at a time; the second pass finds them in the cache."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    top = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_columns, BLOCK):
        inside = start + column < n_columns
        x = tl.load(x_ptr + row * x_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        if FOLD:
            x *= tl.load(fold_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(x))
    scale = tl.maximum(tl.max(top, axis=0), 1e-30) * (1.0 / 448.0)
    if POWER:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, scale)
    factor = 1.0 / scale
    for start in range(0, n_columns, BLOCK):
        inside = start + column < n_columns
        x = tl.load(x_ptr + row * x_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        if FOLD:
            x *= tl.load(fold_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(q_ptr + row * n_columns + start + column, (x * factor).to(q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _transpose_kernel(source_ptr, out_ptr, n_rows, n_columns, source_stride, out_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    tile = tl.load(source_ptr + row[:, None] * source_stride + column[None, :], mask=inside, other=0)
    tl.store(out_ptr + column[:, None] * out_stride + row[None, :], tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def _dequantise_kernel(q_ptr, scale_ptr, out_ptr, n_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_columns
    value = tl.load(q_ptr + row * n_columns + column, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * n_columns + column, value.to(out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def multiplies(device: torch.device) -> bool:
    """Whether this device multiplies in e4m3: Ada, Hopper and later do. The interpreter plays one that does."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return INTERPRETED


def quantise(x: torch.Tensor, fold: torch.Tensor | None = None, *, power: bool = False) -> Quantised:
    """Each row in e4m3 with its scale.

    Args:
        x: ``[rows, columns]`` in bf16, fp16 or fp32; rows may lie apart.
        fold: ``[columns]``: x is multiplied by it first.
        power: scales are powers of two.
    """
    x = as_rows(x)
    rows, columns = x.shape
    if not multiplies(x.device) or columns > MAX_COLUMNS:
        wide = x.float() if fold is None else x.float() * fold
        amax = wide.abs().amax(1) if columns else wide.new_zeros(rows)
        scale = amax.clamp_min(1e-30) * (1 / LARGEST)
        if power:
            scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        return Quantised((wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(E4M3).view(torch.uint8), scale)
    # The interpreter rounds to e4m3 wrongly where the mantissa overflows, so there torch does it.
    data = torch.empty(rows, columns, dtype=torch.float32 if INTERPRETED else E4M3, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile_rows, block, _ = row_tile(columns)
    tensors, how = (x, scale if fold is None else fold, data, scale), (fold is not None, power)
    if x.numel() and columns > _WHOLE:
        sizes: tuple[int, ...] = (columns, x.stride(0))
        launch(_quantise_pieces_kernel, (rows,), tensors, sizes, (*how, _PIECE), num_warps=_PIECE_WARPS)
    elif x.numel():
        sizes, warps = (rows, columns, x.stride(0)), 4 if block <= 4096 else 8
        grid = (cdiv(rows, tile_rows),)
        launch(_quantise_kernel, grid, tensors, sizes, (*how, tile_rows, block), num_warps=warps)
    return Quantised(data.to(E4M3).view(torch.uint8), scale)


def quantise_weight(weight: torch.Tensor) -> FP8:
    """A weight ``[out, in]`` as it will be stored."""
    made = quantise(weight.detach(), power=True)
    return FP8(made.data, made.scale, weight.dtype)


def dequantise(weight: FP8, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight in its own shape and dtype; into ``out``, contiguous, if given."""
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.data.device)
    if out.shape != weight.shape or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)} with strides {out.stride()}, the weight {tuple(weight.shape)}")
    rows, columns = weight.shape
    if not multiplies(out.device) or not weight.data.is_contiguous():
        return out.copy_(weight.data.view(E4M3).float() * weight.scale[:, None])
    block = 1024
    tensors = (weight.data.view(E4M3), weight.scale, out)
    launch(_dequantise_kernel, (rows, cdiv(columns, block)), tensors, (columns,), (block,), num_warps=4)
    return out


def transposed(data: torch.Tensor) -> torch.Tensor:
    """``[rows, columns]`` bytes as ``[columns, rows]``, in scratch memory: to be used before the next call."""
    rows, columns = data.shape
    out = scratch((columns, rows), torch.uint8, data.device)
    if not multiplies(data.device):
        return out.copy_(data.t())
    numbers = (rows, columns, data.stride(0), out.stride(0))
    launch(_transpose_kernel, (cdiv(rows, _TILE), cdiv(columns, _TILE)), (data, out), numbers, (_TILE,), num_warps=8)
    return out


def joined(weights: Sequence[FP8]) -> FP8 | None:
    """Weights of one width that lie side by side in memory, as one weight ``[Σ out, in]``; None if they do not."""
    first = weights[0]
    out, width = 0, first.shape[1]
    for weight in weights:
        if weight.shape[1] != width or not weight.data.is_contiguous() or weight.dtype != first.dtype:
            return None
        if weight.data.data_ptr() != first.data.data_ptr() + out * width:
            return None
        if weight.scale.data_ptr() != first.scale.data_ptr() + 4 * out:
            return None
        if weight.data.untyped_storage().data_ptr() != first.data.untyped_storage().data_ptr():
            return None
        out += weight.shape[0]
    data = first.data.as_strided((out, width), (width, 1))
    return FP8(data, first.scale.as_strided((out,), (1,)), first.dtype)


def serves(weight: FP8, dtype: torch.dtype) -> bool:
    """Whether products with this weight run in 8 bits for inputs of ``dtype``: only bf16 comes out of them."""
    fits = weight.shape[0] % _SIDE == 0 and weight.shape[1] % _SIDE == 0
    return fits and dtype == torch.bfloat16 and multiplies(weight.data.device) and proven(weight.data.device)


def product(x: Quantised, weight: FP8, out: torch.Tensor | None = None) -> torch.Tensor:
    """x·Wᵀ, ``[rows, out]`` in bf16."""
    return _scaled(x, weight.data, weight.scale, out)


def input_gradient(dy: torch.Tensor, weight: FP8, out: torch.Tensor | None = None) -> torch.Tensor:
    """dy·W, ``[rows, in]`` in bf16, for dy ``[rows, out]``."""
    g = quantise(dy, fold=weight.scale.to(torch.bfloat16))  # exact, and half as much to read for each row
    return _scaled(g, transposed(weight.data), _ones(weight.shape[1], dy.device), out)


def _scaled(x: Quantised, data: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """diag(x.scale)·x·dataᵀ·diag(scale) for data ``[n, columns of x]``."""
    a, b = x.data.view(E4M3), data.view(E4M3)
    if a.is_cuda:
        options: dict[str, Any] = {} if out is None else {"out": out}
        return torch._scaled_mm(
            a, b.t(), scale_a=x.scale[:, None], scale_b=scale[None, :], out_dtype=torch.bfloat16,
            use_fast_accum=True, **options,
        )  # fmt: skip
    made = (a.float() @ b.float().t() * x.scale[:, None] * scale[None, :]).to(torch.bfloat16)
    return made if out is None else out.copy_(made)


@functools.cache
def _ones(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, dtype=torch.float32, device=device)


@functools.cache
def proven(device: torch.device) -> bool:
    """Whether 8-bit products on this device are what they should be."""
    return prove(device).ok


def prove(device: torch.device) -> selfcheck.Verdict:
    """Both products against float64 ones of the same quantised operands: only the sums and one rounding differ."""

    def trial() -> selfcheck.Verdict:
        rows, out, width = (16, 32, 48) if INTERPRETED else (256, 512, 1024)
        weight = quantise_weight(selfcheck._random((out, width), torch.bfloat16, device))
        x = selfcheck._random((rows, width), torch.bfloat16, device, seed=1)
        dy = selfcheck._random((rows, out), torch.bfloat16, device, seed=2)
        exact = weight.data.view(E4M3).double() * weight.scale.double()[:, None]
        for name, got, truth in (
            ("output", product(quantise(x), weight), x.double() @ exact.t()),
            ("gradient", input_gradient(dy, weight), dy.double() @ exact),
        ):
            error = selfcheck._relative_error(got, truth)
            # Rounding an operand to 3 bits of mantissa errs by 2.6% (root mean square).
            if not 1e-3 < error < 0.04:
                return selfcheck.Verdict(False, f"the {name} of an 8-bit product lies {error:.1e} from float64's")
        return selfcheck.Verdict(True)

    return selfcheck.proven("fp8", __file__, device, "both products", trial)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FP8) -> torch.Tensor:
        ctx.weight = weight
        rows = as_rows(x)
        if serves(weight, x.dtype):
            y = product(quantise(rows), weight)
        else:
            y = rows @ _dense(weight, x.dtype).t()
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        weight, rows = ctx.weight, as_rows(dy)
        if serves(weight, dy.dtype):
            dx = input_gradient(rows, weight)
        else:
            dx = rows @ _dense(weight, dy.dtype)
        return dx.view(*dy.shape[:-1], weight.shape[1]), None


def linear(x: torch.Tensor, weight: FP8, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``[..., in]`` to ``[..., out]``; the gradient is that of x alone. Computed in x's dtype, or in autocast's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        y = _Linear.apply(x, weight)
        return y if bias is None else y + bias.to(y.dtype)


def _dense(weight: FP8, dtype: torch.dtype) -> torch.Tensor:
    """The weight in ``dtype``, in scratch memory: to be used before the next call."""
    return dequantise(weight, scratch(tuple(weight.shape), dtype, weight.data.device))


class FP8Linear(nn.Linear):
    """A frozen linear layer in e4m3; adapters go around it as around any linear layer.

    Its ``weight`` holds the bytes, ``weight_scale`` the scales; both are filled when the model is loaded.

    Args:
        dtype: of the weight as it was.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        nn.Module.__init__(self)  # the base class would make a weight to be trained
        self.in_features, self.out_features, self.weight_dtype = in_features, out_features, dtype
        self.weight = _frozen(torch.empty(out_features, in_features, dtype=torch.uint8, device=device))
        self.weight_scale = _frozen(torch.empty(out_features, dtype=torch.float32, device=device))
        self.register_parameter(
            "bias", _frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    @classmethod
    def of(cls, stock: nn.Linear) -> FP8Linear:
        """The layer with its weight quantised."""
        weight, made = stock.weight, quantise_weight(stock.weight)
        layer = cls(stock.in_features, stock.out_features, stock.bias is not None, weight.dtype, weight.device)
        layer.weight, layer.weight_scale = _frozen(made.data), _frozen(made.scale)
        if stock.bias is not None:
            layer.bias = _frozen(stock.bias.detach())
        return layer

    @property
    def state(self) -> FP8:
        """The weight as kernels take it."""
        return FP8(self.weight.detach(), self.weight_scale.detach(), self.weight_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.state, self.bias)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def join(layers: Sequence[FP8Linear]) -> None:
    """Lay the weights of layers of one width side by side in memory, where :func:`joined` finds them."""
    data = torch.cat([layer.weight.detach() for layer in layers])
    scale = torch.cat([layer.weight_scale.detach() for layer in layers])
    sizes = [layer.out_features for layer in layers]
    for layer, bytes_, scales in zip(layers, data.split(sizes), scale.split(sizes), strict=True):
        layer.weight.data, layer.weight_scale.data = bytes_, scales


def fp8_state(module: Any) -> FP8 | None:
    """The quantised weight of a module that is such a layer."""
    return module.state if isinstance(module, FP8Linear) else None
