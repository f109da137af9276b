"""The second half of a decoder layer, y = s + down(f(gate(n))·up(n)) with n = norm(s): forward and backward by hand.

Norms stand before and after the unit as :mod:`.residual` says; gate and up are two projections, or the halves of one.

Gate, up and what is made of them are the widest tensors of a layer, three to four times the model's width. Where they
are not kept they need not exist for all rows at once either: rows go through in pieces, forward and backward. In
backward that is for frozen weights: those of a trained one's gradient would be rounded with every piece.

Backward does without the unit's output, so the down projection is not computed twice, unless a norm stands after it:
then that output is kept beside gate and up, or made again with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import glu, lora_glu
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
from .residual import Join, Norm, join, join_gradient, normed, normed_gradient

#: Rows of one piece: as many as keep the products at full speed.
PIECE = 4096
Pairs = list[tuple[torch.Tensor | None, torch.Tensor | None]]


@dataclass(frozen=True)
class MLP:
    """What it is, but for the projections.

    ``norm``: before it; ``join``: after it. ``dtype``: of its products; s may be wider. ``fuses``: the narrow products
    of LoRA are made by ``lora_glu`` where ranks allow it; see :mod:`.faster`.
    """

    norm: Norm | None
    join: Join
    activation: glu.Activation
    dtype: torch.dtype
    fuses: bool = True


@dataclass
class Kept:
    """What waits for the backward pass.

    n·Aᵀ of gate and up, h·Aᵀ of down, and 1 / root mean square of what a norm stands after; what gate and up made, and
    what a norm stands after, if they are kept.
    """

    na: torch.Tensor | None
    ha: torch.Tensor | None
    rstd: torch.Tensor | None = None
    gate_up: list[torch.Tensor] | None = None
    o: torch.Tensor | None = None


def forward(s: torch.Tensor, y: torch.Tensor, mlp: MLP, pair: Group, down: Group, *, keep: bool) -> Kept:
    """Write y, ``[rows, hidden]`` like s; it may be s itself.

    Args:
        pair: gate and up, as two projections or one; down: the down projection alone.
        keep: gate and up wait for the backward pass, and what a norm stands after.
    """
    weights = dense([part.weight for part in (*pair.parts, *down.parts)], mlp.dtype)
    kept = []
    for mine, out in zip(*_pieces(keep, s, y), strict=True):
        n, _ = normed(mine, mlp.norm, mlp.dtype)
        na = shrink(n, pair)
        made = _gate_up(n, na, pair, down, mlp, weights)
        del n
        h = _activated(made, na, pair, down, mlp)
        kept.append(Kept(na, shrink(h, down), gate_up=made if keep else None))
        del made
        joined = join(mine, h, kept[-1].ha, down, mlp.join, weights[-1:], out=out)
        kept[-1].rstd = joined.rstd
        kept[-1].o = joined.o if keep else None
        del h, joined
    if len(kept) == 1:
        return kept[0]
    na, ha, rstd = (_joined([getattr(one, name) for one in kept]) for name in ("na", "ha", "rstd"))
    return Kept(na, ha, rstd)


def backward(
    dy: torch.Tensor, s: torch.Tensor, kept: Kept, mlp: MLP, pair: Group, down: Group
) -> tuple[torch.Tensor, Pairs, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The gradient of s, the pairs of gate, up and down, and those of the weights of the norms before and after.

    Writes over what was kept.
    """
    weights = dense([part.weight for part in (*pair.parts, *down.parts)], mlp.dtype)
    ds: list[torch.Tensor] = []
    total: Pairs | None = None
    dnorms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    small = [t if t is not None else s[:, :0] for t in (kept.na, kept.ha, kept.rstd)]
    norms = [norm for norm in (mlp.norm, mlp.join.norm) if norm is not None]
    trained = any(part.trained for part in (*pair.parts, *down.parts)) or any(norm.trained for norm in norms)
    at_once = kept.gate_up is not None or trained
    for d, mine, na, ha, rstd in zip(*_pieces(at_once, dy, s, *small), strict=True):
        piece = Kept(
            na if kept.na is not None else None, ha if kept.ha is not None else None,
            rstd if kept.rstd is not None else None, kept.gate_up, kept.o,
        )  # fmt: skip
        kept.gate_up = kept.o = None
        made, pairs, dnorms = _piece_backward(d, mine, piece, mlp, pair, down, weights)
        ds.append(made)
        total = pairs if total is None else [_summed(a, b) for a, b in zip(total, pairs, strict=True)]
    assert total is not None
    return ds[0] if len(ds) == 1 else torch.cat(ds), total, dnorms


def _piece_backward(
    dy: torch.Tensor, s: torch.Tensor, kept: Kept, mlp: MLP, pair: Group, down: Group, weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, Pairs, tuple[torch.Tensor | None, torch.Tensor | None]]:  # fmt: skip
    n, rstd = normed(s, mlp.norm, mlp.dtype)
    made = kept.gate_up or _gate_up(n, kept.na, pair, down, mlp, weights)
    kept.gate_up = None
    if mlp.join.norm is not None and kept.o is None:
        h = _activated(made, kept.na, pair, down, mlp)
        (kept.o,) = project(h, kept.ha, down, weights[-1:])
        del h
    d, dafter = join_gradient(dy, kept.o, kept.rstd, mlp.join, mlp.dtype)
    kept.o = None

    dha, down_bs = expand_gradients([d], kept.ha, down)
    dh = input_gradient([d], dha, down, weights[-1:])
    dna: torch.Tensor | None
    bs: list[torch.Tensor | None]
    fused, (gate, up) = _fused(kept.na, pair, down, mlp), _halves(made)
    if fused is not None:
        wide = lora_glu.backward(dh, gate, up, *fused, mlp.activation, dha)
        del dh
        dna, bs, down_as = inner_gradients(made, pair), [wide.db_gate, wide.db_up], [wide.da_down]
    else:
        glu.backward(dh, gate, up, mlp.activation, dgate=gate, dup=up, h=dh)
        down_as = shrink_gradients(dha, dh, down, [d])  # dh has become h
        del dh
        dna, bs = expand_gradients(made, kept.na, pair)
    del d
    as_ = shrink_gradients(dna, n, pair, made)
    dn = input_gradient(made, dna, pair, weights[:-1], out=None if n is s else n)
    del made, gate, up
    ds, dbefore = normed_gradient(dn, dy, s, mlp.norm, rstd)
    return ds, [*zip(as_, bs, strict=True), *zip(down_as, down_bs, strict=True)], (dbefore, dafter)


def _pieces(at_once: bool, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """All cut at the same rows."""
    rows = tensors[0].shape[0]
    if at_once or rows <= PIECE:
        return [(tensor,) for tensor in tensors]
    return [tensor.split(PIECE) for tensor in tensors]


def _fused(na: torch.Tensor | None, pair: Group, down: Group, mlp: MLP) -> tuple[Any, Any, tuple[float, float]] | None:
    """What ``lora_glu`` needs to make narrow products of the MLP by itself; None if they are made one by one."""
    if not mlp.fuses or na is None or len(pair.parts) == 1:
        return None
    gate, up = pair.parts
    if (
        not 0 < gate.rank == up.rank <= lora_glu.MAX_RANK
        or down.parts[0].rank not in (0, gate.rank)
        or down.parts[0].trained
    ):
        return None
    return torch.split_with_sizes(na, pair.ranks, 1), pair.b, (gate.scaling, up.scaling)


def _gate_up(
    n: torch.Tensor, na: torch.Tensor | None, pair: Group, down: Group, mlp: MLP, weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Both products, or the one; without their adapters' share if the activation adds it."""
    return project(n, None if _fused(na, pair, down, mlp) is not None else na, pair, weights[:-1])


def _halves(made: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, where they lie."""
    gate, up = made if len(made) == 2 else made[0].chunk(2, dim=1)
    return gate, up


def _activated(made: list[torch.Tensor], na: torch.Tensor | None, pair: Group, down: Group, mlp: MLP) -> torch.Tensor:
    """h, what the down projection is given."""
    fused, (gate, up) = _fused(na, pair, down, mlp), _halves(made)
    if fused is None:
        return glu.forward(gate, up, mlp.activation)
    return lora_glu.forward(gate, up, *fused, mlp.activation)


def _joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None


def _summed(
    a: tuple[torch.Tensor | None, ...], b: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    first, second = (x + y if x is not None and y is not None else None for x, y in zip(a, b, strict=True))
    return first, second
