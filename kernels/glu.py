"""Gated linear units: h = f(gate) · up, with f = SiLU (SwiGLU), GELU-tanh or GELU-erf (GeGLU).

    SiLU       f(g) = g·σ(g)                      f'(g) = σ(g)·(1 + g·(1 − σ(g)))
    GELU-tanh  f(g) = ½g·(1 + tanh u) = g·σ(2u)   f'(g) = σ(2u) + g·σ(2u)·(1 − σ(2u))·2u'
               u = √(2/π)·(g + 0.044715 g³)      u' = √(2/π)·(1 + 3·0.044715 g²)
    GELU-erf   f(g) = g·Φ(g)                      f'(g) = Φ(g) + g·φ(g)

    dgate = dh · up · f'(g)        dup = dh · f(g)

Sources: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; Hendrycks and Gimpel, "Gaussian Error Linear
Units", arXiv 1606.08415. tanh is written through σ, exactly: Triton's own needs libdevice.

Only gate and up are saved: the activation and the product are computed again in the backward pass, which reads and
writes each value once and may write over its inputs.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import as_rows, cdiv, launch

Activation = Literal["silu", "gelu-tanh", "gelu-erf"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

_SILU = tl.constexpr(0)
_GELU_TANH = tl.constexpr(1)
_BLOCK = 1024  # 8 bf16 values (16 bytes) per thread and array at 4 warps


@triton.jit
def _sigmoid(x, QUICK: tl.constexpr):
    """1 / (1 + e⁻ˣ). A division takes eight instructions and e to a power six; quick, 1/√² takes two and 2 to a power
    two, and what is rounded to 16 bits afterwards knows no difference.
    """
    if QUICK:
        root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
        sigma = root * root
    else:
        sigma = tl.sigmoid(x)
    return sigma


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr, QUICK: tl.constexpr):
    """f and f' of fp32 values."""
    if ACTIVATION == _SILU:
        sigma = _sigmoid(gate, QUICK)
        value = gate * sigma
        slope = sigma * (1.0 + gate * (1.0 - sigma))
    elif ACTIVATION == _GELU_TANH:
        square = gate * gate
        sigma = _sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * square), QUICK)
        value = gate * sigma
        slope = sigma + value * (1.0 - sigma) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * cdf
        slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return value, slope


@triton.jit(do_not_specialize=["blocks"])
def _forward(
    gate_ptr, up_ptr, h_ptr, n_columns, blocks, gate_stride, up_stride, h_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 64-bit: 8192 tokens x 14336 is in reach of 2^31 once batches grow.
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_columns
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(gate, ACTIVATION, False)
    tl.store(h_ptr + row * h_stride + column, (value * up).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _backward(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, n_columns, blocks,
    dh_stride, gate_stride, up_stride, dgate_stride, dup_stride, h_stride,
    ACTIVATION: tl.constexpr, WITH_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_columns
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION, False)
    # Every load stands before every store, so an output may share its memory with an input.
    tl.store(dgate_ptr + row * dgate_stride + column, (dh * up * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * dup_stride + column, (dh * value).to(dup_ptr.dtype.element_ty), mask=inside)
    if WITH_H:
        tl.store(h_ptr + row * h_stride + column, (value * up).to(h_ptr.dtype.element_ty), mask=inside)


def _launch(kernel: Any, tensors: list[torch.Tensor], constants: tuple[Any, ...]) -> None:
    """On tensors as rows, or on all as one long row if nothing but contiguous memory is involved."""
    rows, columns = tensors[0].shape
    if all(tensor.is_contiguous() for tensor in tensors):
        rows, columns = 1, rows * columns
        strides = (columns,) * len(tensors)
    else:
        strides = tuple(tensor.stride(0) for tensor in tensors)
    blocks = cdiv(columns, _BLOCK)
    launch(kernel, (rows * blocks,), tuple(tensors), (columns, blocks, *strides), (*constants, _BLOCK), num_warps=4)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """f(gate) · up without autograd. Shapes ``[..., columns]``, any strides (halves of one merged product too)."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError("gate and up differ in shape or dtype")
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if h.numel():
        _launch(_forward, [as_rows(gate), as_rows(up), as_rows(h)], (ACTIVATIONS.index(activation),))
    return h


def backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation, *,
    dgate: torch.Tensor, dup: torch.Tensor, h: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write both gradients, and the product again if ``h`` is given (the down projection's weight gradient needs it).

    The outputs, ``[..., columns]`` with columns side by side and rows evenly spaced, may be ``dh``, ``gate`` and
    ``up`` themselves, in any pairing: that is how a fused MLP does without new memory.
    """
    if not dh.numel():
        return
    with_h = h is not None
    written = (dgate, dup) if h is None else (dgate, dup, h)
    # A view or an error: a copy would lose the result.
    outputs = [out if out.dim() == 2 else out.view(-1, out.shape[-1]) for out in written]
    if any(out.stride(-1) != 1 for out in outputs):
        raise ValueError("an output of the backward pass has scattered columns")
    if h is None:
        outputs.append(outputs[-1])
    rows = [as_rows(dh), as_rows(gate), as_rows(up), *outputs]
    _launch(_backward, rows, (ACTIVATIONS.index(activation), with_h))


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        # New memory: autograd may run this graph twice, and dh may be held by a hook.
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        backward(dh, gate, up, ctx.activation, dgate=dgate, dup=dup)
        return dgate, dup, None


def glu(gate: torch.Tensor, up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """f(gate) · up, differentiable.

    Args:
        gate, up: ``[..., columns]`` in bf16, fp16 or fp32, of one shape and dtype.
        activation: f; see :data:`Activation`.
    """
    return _GLU.apply(gate, up, activation)


def glu_reference(gate: torch.Tensor, up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """The same in plain PyTorch, as models write it; float64 in gives float64 arithmetic."""
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu-tanh" else "none") * up
