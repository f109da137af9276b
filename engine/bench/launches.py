"""How fast this host starts kernels: an eager decoder layer so small that the device always waits for Python.

The layer has the operations of a Llama layer of transformers, 38 kernels forward with views left out, so that the time
of one, over their number, is what :mod:`finetui.planner.speed` reckons with where a micro-batch is small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

#: Kernels of one layer's forward, and layers of one call.
KERNELS, LAYERS = 38, 8
_WIDTH, _HEADS, _TOKENS = 64, 2, 8


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(_WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = _Norm(), _Norm()
        self.q, self.k, self.v, self.o = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (
            part(normed).view(1, _TOKENS, _HEADS, _WIDTH // _HEADS).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(_turned(q, cos, sin), _turned(k, cos, sin), v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(1, _TOKENS, _WIDTH))
        normed = self.after(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def small_layers(device: torch.device) -> Callable[[], torch.Tensor]:
    """A forward pass of :data:`LAYERS` layers in 16 bits that records for its backward, as a training step does."""
    layers = nn.ModuleList(_Layer() for _ in range(LAYERS)).to(device, torch.bfloat16)
    hidden = torch.randn(1, _TOKENS, _WIDTH, device=device, dtype=torch.bfloat16)
    cos, sin = (torch.randn(_TOKENS, _WIDTH // _HEADS, device=device, dtype=torch.bfloat16) for _ in range(2))

    def forward() -> torch.Tensor:
        x = hidden
        for layer in layers:
            x = layer(x, cos, sin)
        return x

    return forward
