"""Optimiser states in 8 bits, block by block: 256 values and their largest one.

The format is the dynamic one of Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861:
within each power of ten the codes are evenly spaced, and each larger power of ten has twice as many. The number of
codes below a value is therefore a concave function made of straight lines, so it is the least of them; a code's value
is the middle of its cell.

A first moment has a sign and 7 bits, in two's complement, for six powers of ten and what lies below them; a second
moment 8 bits for seven. What is not 0 has no code below 1 there: with ε = 1e-8 the next update of a weight whose second
moment became 0 would be enormous.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

#: Values that share a scale.
BLOCK = 256
_LANES = tl.constexpr(32)


@triton.jit
def _least(a, b):
    """The smaller of two positive numbers. Their bits are ordered as they are; Hopper takes three integers at once."""
    return tl.minimum(a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _cells(x, POWERS: tl.constexpr, OFFSET: tl.constexpr):
    """How many codes lie below x, which is in units of 10^(POWERS − 6) of the largest value; plus an offset.

    In these units the lines of both moments are the same, and so are the constants that a processor holds.
    """
    cells = x * (2.0 * 10.0**5 / 0.9) + (2 * 8 / 9 - 1 + OFFSET)
    for j in tl.static_range(2, POWERS + 1):
        cells = _least(cells, x * (2.0**j * 10.0 ** (6 - j) / 0.9) + (2.0**j * 8 / 9 - 1 + OFFSET))
    return cells


@triton.jit
def _inverse(x):
    """A little more than 1 / x for x ≥ 0, so that the largest value has the largest code whatever the rounding."""
    root = tl.rsqrt(tl.maximum(x, 1e-37))
    return root * root * 1.000001


@triton.jit
def read_codes(ptr, block, left, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The codes of whole blocks, of which ``left`` values are there, as int32 ``[blocks, BLOCK]``; 0 beyond those.

    Args:
        block: ``[blocks, 1]``, their numbers.
        ALIGNED: they start and end at multiples of 16 bytes. Then they are read and taken apart as words: bytes would
            be widened twice.
    """
    if ALIGNED:
        word = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
        inside = word < tl.multiple_of(left // 4, 4)
        read = tl.load(ptr.to(tl.pointer_type(tl.uint32)) + word, mask=inside, other=0)
        codes = (read[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]) & 255
        return tl.reshape(codes, [BLOCKS, BLOCK]).to(tl.int32)
    at = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + at, mask=at < left, other=0).to(tl.int32)


@triton.jit
def look_up(table, m_codes, v_codes, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """What the codes of both moments stand for, in units of their blocks' largest values.

    One gather for both: the table is put into shared memory once per tile. Look-ups through a pointer would move every
    code to another thread and back.
    """
    which = tl.reshape(tl.join(m_codes, v_codes + 256), [BLOCKS * BLOCK * 2])
    return tl.split(tl.reshape(tl.gather(table, which, 0), [BLOCKS, BLOCK, 2]))


@triton.jit
def largest(x, SIGNED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest |x| of each row, ``[BLOCKS, 1]``. A warp compares integers in one instruction, numbers in ten."""
    each = tl.reshape(tl.abs(x) if SIGNED else x, [BLOCKS, _LANES, BLOCK // _LANES])
    if SIGNED:  # the sign is free in a comparison of numbers; without one, integers are compared three at a time
        some = tl.max(each, axis=2).to(tl.int32, bitcast=True)
    else:
        some = tl.max(each.to(tl.int32, bitcast=True), axis=2)
    return tl.max(some, axis=1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def store_scales(ptr, scales, block, left, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """One scale ``[BLOCKS, 1]`` per block, written by the first of the threads that all have it.

    As a column it would go through shared memory to other threads first, and all would wait twice.
    """
    lane = tl.arange(0, _LANES)[None, :]
    known = (block * BLOCK < left) & (lane == 0)
    tl.store(ptr + block + lane, tl.broadcast_to(scales, [BLOCKS, _LANES]), mask=known)


@triton.jit
def signed_codes(x, top):
    """Codes of x whose largest magnitude in each row is ``top``, as bytes in two's complement."""
    cells = _cells(tl.abs(x) * _inverse(top), 6, -0.5)
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    cells = (cells.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    # Adding 1.5·2²³ leaves the nearest integer in the low bits, cheaper than a cast.
    return (cells + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def positive_codes(x, top):
    """Codes of x ≥ 0 whose largest value in each row is ``top``; at least 1 where x is not 0."""
    # From 1.5·2¹⁵ on the second byte of a number is its lowest whole one: 2⁻⁸ of a cell decides where one ends.
    cells = _cells(x * (_inverse(top) * 10.0), 7, 49152.0).to(tl.int32, bitcast=True)
    least = tl.minimum(x.to(tl.int32, bitcast=True), 256) + 0x47400000
    return (tl.maximum(cells, least) >> 8).to(tl.uint8)


@functools.cache
def table(device: torch.device) -> torch.Tensor:
    """What :func:`look_up` reads, fp32 ``[512]``: the values of the first moment's bytes, then of the second's."""
    return torch.cat((values(signed=True), values(signed=False))).to(device)


def values(signed: bool) -> torch.Tensor:
    """What the codes of a state stand for, in units of its block's largest value: 256 of m (signed) or of v.

    Those of m are 8-bit numbers in two's complement, −127 … 127; −128 is not used.
    """
    top = 6 if signed else 7
    middle = torch.arange(2 ** (top + 1), dtype=torch.float64) + 0.5
    lines = [(middle - (2.0**j * 8 / 9 - 1)) * (0.9 / (2.0**j * 10.0 ** (top - j))) for j in range(1, top + 1)]
    table = torch.stack(lines).amax(0).clamp(0, 1).float()
    return torch.cat((table, -torch.ones(1), -table[1:].flip(0))) if signed else table


def dequantised(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A state (``exp_avg`` or ``exp_avg_sq``) as fp32, however it is stored."""
    stored = state[name]
    if stored.is_floating_point():
        return stored.float()
    table = values(signed=name == "exp_avg").to(stored.device)
    flat = table[stored.view(torch.uint8).reshape(-1).long()]
    return (flat * state[f"{name}_scale"].repeat_interleave(BLOCK)[: flat.numel()]).view(stored.shape)
