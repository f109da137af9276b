"""Linear layers that share an input, each frozen, frozen with a LoRA adapter, or trained; forward and backward by hand.

    y_i   = x·W_iᵀ + b_i + s_i·(x·A_iᵀ)·B_iᵀ
    dXA_i = s_i·dy_i·B_i          dB_i = s_i·dy_iᵀ·(x·A_iᵀ)          dA_i = dXA_iᵀ·x
    dx    = Σ_i dXA_i·A_i + Σ_i dy_i·W_i
    dW_i  = dy_iᵀ·x               db_i = Σ_rows dy_i                 where the layer itself is trained

Source: Hu et al., "LoRA", arXiv 2106.09685. No autograd here: these are the pieces of larger functions, which decide
what is kept between the two passes. The adapters of a group arrive stacked, so that x·A and dA are one product each;
the small products go first and the large one adds to them in its own fp32 sums.

The gradients of a layer's own tensors come in pairs, A and B of its adapter or its weight and bias: the first of each
needs the input (:func:`shrink_gradients`), the second does without (:func:`expand_gradients`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import faster, fp8, fp8_projection, lora_add
from .fp8 import FP8
from .nf4 import NF4, dequantise, scratch
from .weight_gradient import bias_gradient, weight_gradient
from .wide import mm_fp32


@dataclass(frozen=True)
class Projection:
    """One linear layer.

    Args:
        weight: ``[out, in]``, dense, NF4 or e4m3; bias: ``[out]`` or None.
        rank: of its adapter, 0 if it has none; scaling: s.
        trained: weight and bias are trained themselves; the weight is dense then, and there is no adapter.
    """

    weight: torch.Tensor | NF4 | FP8
    bias: torch.Tensor | None = None
    rank: int = 0
    scaling: float = 1.0
    trained: bool = False

    @property
    def tensors(self) -> int:
        """How many tensors of it are trained."""
        return 2 if self.rank else int(self.trained) * (1 + (self.bias is not None))

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])


@dataclass(frozen=True)
class Group:
    """Projections of one input with their adapters in the dtype computed in.

    Args:
        a: ``[Σ rank, in]``, or None if none has an adapter.
        b: ``[out, rank]`` for each.
    """

    parts: tuple[Projection, ...]
    a: torch.Tensor | None
    b: tuple[torch.Tensor | None, ...]

    @functools.cached_property
    def ranks(self) -> list[int]:
        return [part.rank for part in self.parts]


def dense(weights: Sequence[torch.Tensor | NF4 | FP8], dtype: torch.dtype) -> list[Any]:
    """The weights in ``dtype``; NF4 ones side by side in scratch memory, to be used before the next call.

    If all are in e4m3, and products in 8 bits serve, they stay as they are: :func:`project` and
    :func:`input_gradient` take them so.
    """
    plain = [w.to(dtype) for w in weights if isinstance(w, torch.Tensor)]
    if len(plain) == len(weights):
        return plain
    if all(isinstance(w, FP8) and fp8.serves(w, dtype) for w in weights):
        return list(weights)
    sizes = [math.prod(w.shape) if isinstance(w, NF4 | FP8) else 0 for w in weights]
    device = next((_place(w) for w in weights if isinstance(w, NF4 | FP8)), None)
    buffer = scratch((sum(sizes),), dtype, device) if device is not None else torch.empty(0)
    result, start = [], 0
    for weight, size in zip(weights, sizes, strict=True):
        if isinstance(weight, NF4):
            if weight.dtype == dtype:
                result.append(dequantise(weight, buffer[start : start + size].view(weight.shape)))
            else:
                result.append(dequantise(weight).to(dtype))
            start += size
        elif isinstance(weight, FP8):
            result.append(fp8.dequantise(weight, buffer[start : start + size].view(weight.shape)))
            start += size
        else:
            result.append(weight.to(dtype))
    return result


def _place(weight: NF4 | FP8) -> torch.device:
    return weight.packed.device if isinstance(weight, NF4) else weight.data.device


def shrink(x: torch.Tensor, group: Group) -> torch.Tensor | None:
    """x·Aᵀ of all adapters in one product, ``[rows, Σ rank]``."""
    return torch.mm(x, group.a.t()) if group.a is not None else None


def columns(xa: torch.Tensor | None, group: Group) -> list[torch.Tensor | None]:
    """Each adapter's share of ``xa``."""
    if xa is None:
        return [None] * len(group.parts)
    if len(group.parts) == 1:
        return [xa]
    shares = torch.split_with_sizes(xa, group.ranks, 1)
    return [share if rank else None for share, rank in zip(shares, group.ranks, strict=True)]


def rows_of(da: torch.Tensor, group: Group) -> list[torch.Tensor | None]:
    """Each adapter's rows of the stacked ``da``, ``[Σ rank, in]``."""
    if len(group.parts) == 1:
        return [da]
    pieces = torch.split_with_sizes(da, group.ranks)
    return [rows if rank else None for rows, rank in zip(pieces, group.ranks, strict=True)]


def expand(
    x: torch.Tensor, xa: torch.Tensor | None, weight: torch.Tensor, b: torch.Tensor | None, part: Projection,
    *, add: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """One layer's output: ``add + bias + s·xa·Bᵀ + x·Wᵀ``, the large product last and into the sum.

    Args:
        add: ``[rows, out]``, as a residual; it may be ``out`` itself. In another dtype than x, so is the result.
        out: where to write.
    """
    if add is not None and add.dtype != x.dtype:
        return torch.add(add, expand(x, xa, weight, b, part), out=out)
    if xa is not None and b is not None and add is not None and add is not out and _summed_first(x, part):
        out = torch.empty_like(add) if out is None else out
        bias = None if part.bias is None else part.bias.to(x.dtype)
        lora_add.add_to(out, add, bias, xa, b, part.scaling, keep=False)
        return out.addmm_(x, weight.t())
    base = add
    if part.bias is not None:
        base = part.bias.to(x.dtype)
        if add is not None:
            base = out = torch.add(add, base, out=out)
    if xa is not None and b is not None:
        if base is not None:
            out = _plus(base, xa, b.t(), part.scaling, out)
        else:
            if out is None:
                out = torch.empty(x.shape[0], part.out_features, dtype=x.dtype, device=x.device)
            torch.addmm(out, xa, b.t(), beta=0, alpha=part.scaling, out=out)
        base = out
    return torch.mm(x, weight.t(), out=out) if base is None else _plus(base, x, weight.t(), 1.0, out)


def _summed_first(x: torch.Tensor, part: Projection) -> bool:
    """Residual, bias and adapter are added up by a kernel of ours; a product would copy the residual first."""
    return part.rank <= lora_add.MAX_RANK and faster.sum_first(x.device, x.dtype, part.out_features, part.rank).ok


def _plus(
    base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, out: torch.Tensor | None
) -> torch.Tensor:
    """base + s·a·b in ``out``; without a copy of base first if they are one."""
    if base is out:
        return base.addmm_(a, b, alpha=scaling)
    return torch.addmm(base, a, b, alpha=scaling, out=out)


def project(
    x: torch.Tensor, xa: torch.Tensor | None, group: Group, weights: Sequence[Any] | None = None, *,
    add: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """All outputs of a group, each plus ``add``; ``out``, for a group of one, may be ``add`` itself."""
    weights = dense([part.weight for part in group.parts], x.dtype) if weights is None else weights
    shares = columns(xa, group)
    if isinstance(weights[0], FP8):
        biases, scalings = [part.bias for part in group.parts], [part.scaling for part in group.parts]
        made = fp8_projection.project(x, weights, biases, shares, group.b, scalings, add=add)
        return made if out is None else [out.copy_(made[0])]
    return [
        expand(x, mine, weight, b, part, add=add, out=out)
        for part, weight, mine, b in zip(group.parts, weights, shares, group.b, strict=True)
    ]


def adapter_gradients(
    dy: torch.Tensor, xa: torch.Tensor, b: torch.Tensor, part: Projection, dxa: torch.Tensor
) -> torch.Tensor:
    """dB in fp32, and dXA written into ``dxa``; s is applied to the sums, not to copies."""
    torch.addmm(dxa, dy, b, beta=0, alpha=part.scaling, out=dxa)
    return mm_fp32(dy.t(), xa, part.scaling)


def input_gradient(
    dys: Sequence[torch.Tensor], dxa: torch.Tensor | None, group: Group, weights: Sequence[Any],
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """dx of a group, ``[rows, in]``."""
    if isinstance(weights[0], FP8):
        return fp8_projection.inputs_gradient(dys, weights, dxa, group.a, out)
    terms = [*zip(dys, weights, strict=True)]
    if dxa is not None and group.a is not None:
        terms.insert(0, (dxa, group.a))
    dx = torch.mm(*terms[0], out=out)
    for dy, weight in terms[1:]:
        dx.addmm_(dy, weight)
    return dx


def expand_gradients(
    dys: Sequence[torch.Tensor], xa: torch.Tensor | None, group: Group
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """dXA of a group, and the dB of each, or the gradient of its trained bias."""
    dxa = torch.empty_like(xa) if xa is not None else None
    gradients: list[torch.Tensor | None] = []
    for dy, mine, dmine, b, part in zip(
        dys, columns(xa, group), columns(dxa, group), group.b, group.parts, strict=True
    ):
        if mine is not None and dmine is not None and b is not None:
            gradients.append(adapter_gradients(dy, mine, b, part, dmine))
        else:
            gradients.append(bias_gradient(dy) if part.trained and part.bias is not None else None)
    return dxa, gradients


def inner_gradients(dys: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
    """dXA of a group in which each has an adapter, without the dB of :func:`expand_gradients`."""
    dxa = torch.empty(dys[0].shape[0], sum(group.ranks), dtype=dys[0].dtype, device=dys[0].device)
    for dy, mine, b, part in zip(dys, columns(dxa, group), group.b, group.parts, strict=True):
        assert mine is not None
        assert b is not None
        torch.addmm(mine, dy, b, beta=0, alpha=part.scaling, out=mine)
    return dxa


def shrink_gradients(
    dxa: torch.Tensor | None, x: torch.Tensor, group: Group, dys: Sequence[torch.Tensor] = ()
) -> list[torch.Tensor | None]:
    """dA of each, in fp32, or dW where that is trained; None of a dW that was added to the weight's gradient.

    Args:
        dys: of each, where any is trained.
    """
    none: list[torch.Tensor | None] = [None] * len(group.parts)
    gradients = none if dxa is None else rows_of(mm_fp32(dxa.t(), x), group)
    for place, part in enumerate(group.parts):
        if part.trained:
            assert isinstance(part.weight, torch.Tensor)
            gradients[place] = weight_gradient(dys[place], x, part.weight)
    return gradients
