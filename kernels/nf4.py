"""NF4 weights back to bf16, fp16 or fp32 in one launch, into memory that is used again.

    w_i = T[q_i] · s_b                        q: 4 bits; T: 16 values; s_b: one scale per block of 64 weights
    s_b = T₂[q'_b] · s'_c + offset             if the scales are themselves quantised (8 bits, blocks of 256)

Sources: Dettmers et al., "QLoRA", arXiv 2305.14314; the memory layout is that of bitsandbytes (MIT): two weights per
byte, the first in the high half, row-major over the whole matrix, blocks running on across rows.

The result is bit for bit what ``bitsandbytes.functional.dequantize_4bit`` gives: each product and sum is rounded to
fp32 by itself (fused multiply-add is switched off), then once to the weight's dtype. One pass reads 0.516 bytes per
weight and writes 2, where three launches move 2.77.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, cdiv, launch

_TILE_BYTES, _WARPS = 2048, 8  # of packed weights per program; of 14 ways on an H200 the fastest


@dataclass(frozen=True)
class NF4:
    """A quantised weight.

    Args:
        packed: two weights per byte, flat uint8.
        absmax: one scale per block: fp32, or uint8 if ``nested``.
        code: the 16 values, fp32.
        shape, dtype: of the weight as it was.
        nested: ``(absmax, code, blocksize, offset)`` of the quantised scales.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested: tuple[torch.Tensor, torch.Tensor, int, torch.Tensor] | None = None


def nf4_state(weight: torch.Tensor) -> NF4 | str:
    """The state of a bitsandbytes 4-bit parameter, known by its ``quant_state``; or why it can't be read."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return "its weight is not quantised to 4 bits, or not yet"
    if state.quant_type != "nf4":
        return f"its weight is {state.quant_type}, not nf4"
    if getattr(state, "packing_format_for_cpu", False):
        return "its weight is packed for inference on a CPU"
    if state.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its weight was {state.dtype}"
    packed = weight.detach().view(torch.uint8).reshape(-1)
    if packed.numel() != -(-math.prod(state.shape) // 2):
        return "its weight is sharded"
    nested = None
    if state.nested:
        inner = state.state2
        nested = (inner.absmax.float(), inner.code.float(), int(inner.blocksize), state.offset.float())
    absmax = state.absmax if nested else state.absmax.float()
    return NF4(packed, absmax, state.code.float(), int(state.blocksize), tuple(state.shape), state.dtype, nested)


@triton.jit
def _kernel(
    packed_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr, n_blocks, columns, out_stride,
    NESTED: tl.constexpr, INNER: tl.constexpr, STRIDED: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    known = block < n_blocks - first
    # One scale per block, decoded once. Its first look-up stands before all else, since another one waits for it; the
    # weights are on their way meanwhile.
    scale = tl.load(absmax_ptr + first + block, mask=known, other=0)
    if NESTED:
        inner = tl.load(absmax2_ptr + (first + block) // INNER, mask=known, other=0.0)
        offset = tl.load(offset_ptr)
    word = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    packed = tl.load(packed_ptr + first * WORDS + word, mask=known[:, None], other=0)
    codes = tl.load(code_ptr + tl.arange(0, 16))
    if NESTED:
        scale = tl.load(code2_ptr + scale.to(tl.int32)) * inner + offset
    scale = scale.to(tl.float32)

    # Byte by byte, the high half first. A gather from 16 values in shared memory takes one instruction where a look-up
    # through a pointer takes four, and keeps every value with the thread that stores it.
    shift = (tl.arange(0, 8) ^ 1) * 4
    which = tl.reshape((packed[:, :, None] >> shift[None, None, :]) & 15, [BLOCKS * WORDS * 8])
    value = tl.reshape(tl.gather(codes, which, 0), [BLOCKS, WORDS * 8]) * scale[:, None]
    within = tl.arange(0, WORDS * 8)
    if STRIDED:  # a block lies within one row
        begin = (first + block) * (WORDS * 8)
        row = begin // columns
        place = (row * out_stride + begin - row * columns)[:, None] + within[None, :]
    else:
        out_ptr += first * (WORDS * 8)
        place = block[:, None] * (WORDS * 8) + within[None, :]
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=known[:, None], cache_modifier=".cs")


def dequantise(state: NF4, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight in its own shape and dtype.

    Args:
        out: where to write it: of that shape and dtype, columns side by side. Its rows may lie apart (a part of a
            larger buffer) if the weight's rows are whole blocks.

    Raises:
        ValueError: ``out`` does not fit.
    """
    if out is None:
        out = torch.empty(state.shape, dtype=state.dtype, device=state.packed.device)
    strided = not out.is_contiguous()
    if tuple(out.shape) != state.shape or out.dtype != state.dtype:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, the weight {state.dtype} {state.shape}")
    if strided and (out.dim() != 2 or out.stride(1) != 1 or state.shape[1] % state.blocksize):
        raise ValueError("out may be strided only by rows, and only if rows are whole blocks")
    n = math.prod(state.shape)
    if n % state.blocksize or state.blocksize % 8 or state.packed.data_ptr() % 4:
        return out.copy_(_by_torch(state))  # the shapes of no linear layer
    n_blocks = n // state.blocksize
    nested = state.nested or (state.absmax, state.code, 1, state.code)
    blocks = max(1, _TILE_BYTES * 2 // state.blocksize)
    launch(
        _kernel, (cdiv(n_blocks, blocks),),
        (state.packed.view(torch.int32), state.absmax, state.code, nested[0], nested[1], nested[3], out),
        (n_blocks, out.shape[-1], out.stride(0)),
        (state.nested is not None, nested[2], strided, blocks, state.blocksize // 8),
        num_warps=_WARPS, **({} if INTERPRETED else {"enable_fp_fusion": False}),
    )  # fmt: skip
    return out


def _by_torch(state: NF4) -> torch.Tensor:
    """The same in plain PyTorch: each operation rounds by itself there too."""
    scale = state.absmax
    if state.nested is not None:
        inner, code, blocksize, offset = state.nested
        scale = code[scale.long()] * inner.repeat_interleave(blocksize)[: scale.numel()] + offset
    n = math.prod(state.shape)
    which = torch.stack((state.packed >> 4, state.packed & 15), dim=1).view(-1)[:n].long()
    value = state.code[which] * scale.repeat_interleave(state.blocksize)[:n]
    return value.to(state.dtype).view(state.shape)


_scratch: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for a weight that is needed for one product only.

    One buffer per device and dtype, grown to the largest request and used by every layer in turn: kernels on one
    stream run in order, so the next layer writes only after the last product has read. Never save it for backward.
    """
    n = math.prod(shape)
    buffer = _scratch.get((device, dtype))
    if buffer is None or buffer.numel() < n:
        buffer = _scratch[(device, dtype)] = torch.empty(n, dtype=dtype, device=device)
    return buffer[:n].view(shape)


def scratch_in_use() -> tuple[torch.Tensor, ...]:
    """The buffers as they are: a CUDA graph that was recorded with them needs them after larger ones took over."""
    return tuple(_scratch.values())


def release_scratch() -> None:
    """Give the buffers back, as after training."""
    _scratch.clear()
