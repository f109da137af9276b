"""Products of 16-bit matrices whose fp32 sums are left as they are."""

from __future__ import annotations

import torch


def mm_fp32(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale·a·b in fp32 (fp64 stays fp64); the scale is applied to the sums, as the product writes them."""
    if a.is_cuda and a.dtype not in (torch.float32, torch.float64):
        if scale == 1.0:
            return torch.mm(a, b, out_dtype=torch.float32)
        out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
        return torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=0, alpha=scale, out=out)
    if a.dtype not in (torch.float32, torch.float64):
        a, b = a.float(), b.float()
    if scale == 1.0:
        return torch.mm(a, b)
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def add_mm_fp32(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a·b, ``total`` in fp32."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), out=total)
