"""The second half of a decoder layer, y = s + down(f(gate(n))·up(n)) with n = norm(s): forward and backward by hand.

Gate, up and what is made of them are the widest tensors of a layer, three to four times the model's width. Where they
are not kept they need not exist for all rows at once either: rows go through in pieces, forward and backward. In
backward that is for frozen weights: those of a trained one's gradient would be rounded with every piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import glu, lora_glu, rms_norm
from .projection import (
    Group,
    dense,
    expand_gradients,
    inner_gradients,
    input_gradient,
    project,
    shrink,
    shrink_gradients,
)

#: Rows of one piece: as many as keep the products at full speed.
PIECE = 4096
Pairs = list[tuple[torch.Tensor | None, torch.Tensor | None]]


@dataclass(frozen=True)
class Norm:
    """An RMSNorm. ``trained``: its weight is."""

    weight: torch.Tensor
    eps: float
    form: rms_norm.Form
    trained: bool = False


def normed(rows: torch.Tensor, norm: Norm, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed rows in ``dtype``, and 1 / root mean square of each."""
    y, _, rstd = rms_norm.forward(rows, norm.weight, norm.eps, norm.form, dtype=dtype)
    return y, rstd


@dataclass(frozen=True)
class MLP:
    """What it is, but for the projections.

    ``dtype``: of its products; s may be wider. ``fuses``: the narrow products of LoRA are made by ``lora_glu`` where
    ranks allow it; see :mod:`.faster`.
    """

    norm: Norm
    activation: glu.Activation
    dtype: torch.dtype
    fuses: bool = True


@dataclass
class Kept:
    """What waits for the backward pass: n·Aᵀ of gate and up, h·Aᵀ of down, and gate and up if they are kept."""

    na: torch.Tensor | None
    ha: torch.Tensor | None
    gate_up: list[torch.Tensor] | None = None


def forward(s: torch.Tensor, y: torch.Tensor, mlp: MLP, pair: Group, down: Group, *, keep: bool) -> Kept:
    """Write y, ``[rows, hidden]`` like s; it may be s itself.

    Args:
        pair: gate and up; down: the down projection alone.
        keep: gate and up wait for the backward pass.
    """
    weights = dense([part.weight for part in (*pair.parts, *down.parts)], mlp.dtype)
    kept = []
    for mine, out in zip(*_pieces(keep, s, y), strict=True):
        n, _ = normed(mine, mlp.norm, mlp.dtype)
        na = shrink(n, pair)
        gate, up = _gate_up(n, na, pair, down, mlp, weights)
        del n
        h, ha = _activated(gate, up, na, pair, down, mlp)
        kept.append(Kept(na, ha, [gate, up] if keep else None))
        del gate, up
        project(h, ha, down, weights[2:], add=mine, out=out)
        del h
    if len(kept) == 1:
        return kept[0]
    return Kept(_joined([one.na for one in kept]), _joined([one.ha for one in kept]))


def backward(
    dy: torch.Tensor, s: torch.Tensor, kept: Kept, mlp: MLP, pair: Group, down: Group
) -> tuple[torch.Tensor, Pairs, torch.Tensor | None]:
    """The gradient of s, the pairs of gate, up and down, and that of the norm's weight. Writes over what was kept."""
    weights = dense([part.weight for part in (*pair.parts, *down.parts)], mlp.dtype)
    ds: list[torch.Tensor] = []
    total: Pairs | None = None
    dnorm: torch.Tensor | None = None
    nas, has = (t if t is not None else s[:, :0] for t in (kept.na, kept.ha))
    at_once = kept.gate_up is not None or mlp.norm.trained or any(part.trained for part in (*pair.parts, *down.parts))
    for d, mine, na, ha in zip(*_pieces(at_once, dy, s, nas, has), strict=True):
        piece = Kept(na if kept.na is not None else None, ha if kept.ha is not None else None, kept.gate_up)
        kept.gate_up = None
        made, pairs, dnorm = _piece_backward(d, mine, piece, mlp, pair, down, weights)
        ds.append(made)
        total = pairs if total is None else [_summed(a, b) for a, b in zip(total, pairs, strict=True)]
    assert total is not None
    return ds[0] if len(ds) == 1 else torch.cat(ds), total, dnorm


def _piece_backward(
    dy: torch.Tensor, s: torch.Tensor, kept: Kept, mlp: MLP, pair: Group, down: Group, weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, Pairs, torch.Tensor | None]:  # fmt: skip
    n, rstd = normed(s, mlp.norm, mlp.dtype)
    gate, up = kept.gate_up or _gate_up(n, kept.na, pair, down, mlp, weights)
    kept.gate_up = None

    d = dy.to(mlp.dtype)
    dha, down_bs = expand_gradients([d], kept.ha, down)
    dh = input_gradient([d], dha, down, weights[2:])
    dna: torch.Tensor | None
    bs: list[torch.Tensor | None]
    fused = _fused(kept.na, pair, down, mlp)
    if fused is not None:
        made = lora_glu.backward(dh, gate, up, *fused, mlp.activation, dha)
        del dh
        dna, bs, down_as = inner_gradients([gate, up], pair), [made.db_gate, made.db_up], [made.da_down]
    else:
        glu.backward(dh, gate, up, mlp.activation, dgate=gate, dup=up, h=dh)
        down_as = shrink_gradients(dha, dh, down, [d])  # dh has become h
        del dh
        dna, bs = expand_gradients([gate, up], kept.na, pair)
    as_ = shrink_gradients(dna, n, pair, [gate, up])
    dn = input_gradient([gate, up], dna, pair, weights[:2], out=n)
    del gate, up
    ds, dnorm = rms_norm.backward(dn, dy, s, mlp.norm.weight, rstd, mlp.norm.form, weight_grad=mlp.norm.trained)
    return ds, [*zip(as_, bs, strict=True), *zip(down_as, down_bs, strict=True)], dnorm


def _pieces(at_once: bool, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """All cut at the same rows."""
    rows = tensors[0].shape[0]
    size = rows if at_once else PIECE
    return [tensor.split(max(size, 1)) for tensor in tensors]


def _fused(na: torch.Tensor | None, pair: Group, down: Group, mlp: MLP) -> tuple[Any, Any, tuple[float, float]] | None:
    """What ``lora_glu`` needs to make narrow products of the MLP by itself; None if they are made one by one."""
    gate, up = pair.parts
    if (
        not mlp.fuses
        or na is None
        or not 0 < gate.rank == up.rank <= lora_glu.MAX_RANK
        or down.parts[0].rank not in (0, gate.rank)
        or down.parts[0].trained
    ):
        return None
    return na.split(pair.ranks, dim=1), pair.b, (gate.scaling, up.scaling)


def _gate_up(
    n: torch.Tensor, na: torch.Tensor | None, pair: Group, down: Group, mlp: MLP, weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Both products; without their adapters' share if the activation adds it."""
    return project(n, None if _fused(na, pair, down, mlp) is not None else na, pair, weights[:2])


def _activated(
    gate: torch.Tensor, up: torch.Tensor, na: torch.Tensor | None, pair: Group, down: Group, mlp: MLP
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """h, and h·Aᵀ of the down projection."""
    fused = _fused(na, pair, down, mlp)
    if fused is None:
        h = glu.forward(gate, up, mlp.activation)
        return h, shrink(h, down)
    h = lora_glu.forward(gate, up, *fused, mlp.activation)
    return h, shrink(h, down)


def _joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None


def _summed(
    a: tuple[torch.Tensor | None, ...], b: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    first, second = (x + y if x is not None and y is not None else None for x, y in zip(a, b, strict=True))
    return first, second
