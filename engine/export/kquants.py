"""K-quants: blocks of 256 weights in four, five or six bits each, with scales that are quantised themselves.

The formats are ggml's (https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h and ggml-quants.c); the search for
scales is our own. With d, dmin in fp16 per block, and q the bits of one weight:

- Q6_K: x = d * s * q, with q in -32..31 and a signed byte s for each 16 weights: 6.5625 bits per weight
- Q5_K: x = d * s * q - dmin * m, with q in 0..31, and s, m of six bits for each 32 weights: 5.5 bits
- Q4_K: the same with q in 0..15: 4.5 bits

Scales are those with the least sum of w (x - x')^2 over candidates, each refitted in closed form to the q that it leads
to. The weight w of a number grows with its size: what an input of unit variance makes of large weights matters most.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 256
#: Bits to (groups per block, bytes per block).
FORMATS = {4: (8, 144), 5: (8, 176), 6: (16, 210)}


def quantize(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Weights as the bytes of a GGUF file.

    Args:
        rows: (..., n) with n a multiple of 256; finite.
        bits: 4, 5 or 6.

    Returns:
        uint8, (..., n / 256 * bytes per block).
    """
    groups, size = FORMATS[bits]
    blocks = rows.reshape(-1, groups, BLOCK // groups).float()
    packed = [_six(some) if bits == 6 else _with_minimum(some, bits) for some in blocks.split(4096)]
    return torch.cat(packed).reshape(*rows.shape[:-1], rows.shape[-1] // BLOCK * size)


# --- Q6_K


def _six(blocks: torch.Tensor) -> torch.Tensor:
    scales = _best_scales(blocks, 32)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d = _half(largest / -128.0)
    s = _over(scales, d).round().clamp(-128, 127)
    q = _over(blocks, (d * s)[..., None]).round().clamp(-32, 31)
    codes = (q + 32).to(torch.uint8).reshape(-1, 2, 4, 32)  # halves of a block, then its four rows of 32
    low, high = codes & 15, codes >> 4
    ql = torch.cat([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], dim=-1)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    signed = s.to(torch.int8).view(torch.uint8)
    return torch.cat([ql.flatten(1), qh.flatten(1), signed, _bytes_of(d)], dim=1)


def _best_scales(x: torch.Tensor, top: int) -> torch.Tensor:
    """(blocks, groups): the s with the least error of s * q, q in -top..top-1."""
    weight = x.abs()
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(peak)
    gain = torch.full_like(peak, -1.0)
    for step in range(-9, 10):
        inverse = _over(torch.full_like(peak, -(top + 0.1 * step)), peak)
        q = (x * inverse).round().clamp(-top, top - 1)
        along, own = (weight * x * q).sum(-1, True), (weight * q * q).sum(-1, True)
        won = _over(along * along, own)  # what is left of the error is the rest
        better = won > gain
        best, gain = torch.where(better, _over(along, own), best), torch.where(better, won, gain)
    return best[..., 0]


# --- Q4_K and Q5_K


def _with_minimum(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    top = 2**bits - 1
    scale, low = _best_lines(blocks, top)
    d, dmin = (_half(part.amax(1, keepdim=True) / 63.0) for part in (scale, low))
    s, m = (_over(part, whole).round().clamp(0, 63) for part, whole in ((scale, d), (low, dmin)))
    q = _over(blocks + (dmin * m)[..., None], (d * s)[..., None]).round().clamp(0, top)
    codes = q.to(torch.uint8).reshape(-1, 4, 2, 32)  # four pairs of groups
    packed = [_bytes_of(d), _bytes_of(dmin), _six_bits(s.to(torch.uint8), m.to(torch.uint8))]
    if bits == 5:
        fifth = codes.reshape(-1, 8, 32) >> 4
        packed.append(sum((fifth[:, i] << i for i in range(1, 8)), fifth[:, 0]))
    low_bits = codes & 15
    packed.append((low_bits[:, :, 0] | low_bits[:, :, 1] << 4).flatten(1))
    return torch.cat(packed, dim=1)


def _best_lines(x: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, groups) each: the s and m >= 0 with the least error of s * q - m, q in 0..top."""
    weight = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True)
    scale, minimum = _over(high - low, torch.full_like(low, float(top))).clamp(min=0.0), -low
    error = _error(x, weight, scale, minimum, top)
    total, sum_x = weight.sum(-1, True), (weight * x).sum(-1, True)
    for step in range(21):
        inverse = _over(torch.full_like(low, top - 1.0 + 0.1 * step), high - low)
        q = ((x - low) * inverse).round().clamp(0, top)
        sum_q, sum_qq = (weight * q).sum(-1, True), (weight * q * q).sum(-1, True)
        sum_xq = (weight * x * q).sum(-1, True)
        spread = total * sum_qq - sum_q * sum_q
        slope, offset = _over(total * sum_xq - sum_x * sum_q, spread), _over(sum_qq * sum_x - sum_q * sum_xq, spread)
        through_zero = offset > 0  # a minimum can't be positive
        slope = torch.where(through_zero, _over(sum_xq, sum_qq), slope)
        offset = torch.where(through_zero, 0.0, offset)
        fitted = _error(x, weight, slope, -offset, top)
        better = (fitted < error) & (slope > 0)
        scale, minimum = torch.where(better, slope, scale), torch.where(better, -offset, minimum)
        error = torch.where(better, fitted, error)
    return scale[..., 0], minimum[..., 0]


def _error(x: torch.Tensor, weight: torch.Tensor, s: torch.Tensor, m: torch.Tensor, top: int) -> torch.Tensor:
    q = _over(x + m, s).round().clamp(0, top)
    return (weight * (s * q - m - x).square()).sum(-1, True)


def _six_bits(s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Eight pairs of six bits in twelve bytes: the low bits of the last four fill up the top of the first."""
    first = torch.cat([s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6], dim=1)
    return torch.cat([first, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], dim=1)


# --- small things


def _over(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b, and 0 where b is 0: a group of zeros stays one."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _half(x: torch.Tensor) -> torch.Tensor:
    """Rounded to fp16, in fp32: what follows must be computed with the number that is stored."""
    return x.half().float()


def _bytes_of(d: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(d.half().numpy().astype("<f2").view(np.uint8))
