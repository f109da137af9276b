"""Products of 16-bit matrices whose fp32 sums are left as they are."""

from __future__ import annotations

import torch


def mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a·b in fp32 (fp64 stays fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def add_mm_fp32(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a·b, ``total`` in fp32."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), out=total)
