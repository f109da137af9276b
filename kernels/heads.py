"""Queries, keys and values as attention takes them, of what was projected: forward and backward by hand.

    q, k = rope(norm(q), norm(k))       or, in this order, norm(rope(q)), norm(rope(k)) (HunYuan)

Norms are over each head (Qwen 3, Gemma 3) or over all heads at once (OLMo 2); either step may be missing (the layers of
SmolLM 3 and EXAONE 4 without positions). What was projected is one tensor each, or one for all three (Phi 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import rms_norm, rope
from .residual import Norm


@dataclass(frozen=True)
class Turn:
    """What is done to queries and keys.

    Args:
        dim: of a head; width: of the queries of all heads.
        layout: of the rotary embedding; None without one.
        q_norm, k_norm: both or none, over a head or over all.
        rotates_first: the embedding comes before the norms.
    """

    dim: int
    width: int
    layout: rope.Layout | None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotates_first: bool = False

    @property
    def norms(self) -> tuple[Norm, ...]:
        return () if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)


@dataclass
class Heads:
    """Queries, keys and values ``[batch, heads, tokens, dim]``.

    ``projected`` is what they were made of, as rows: what a norm makes is a new tensor, all else is done in place.
    ``rstd`` is of the norms.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    projected: list[torch.Tensor]
    rstd: list[torch.Tensor]


def forward(
    projected: list[torch.Tensor], turn: Turn, cos: torch.Tensor, sin: torch.Tensor, batch: int, *,
    rotated: bool = False,
) -> Heads:  # fmt: skip
    """Heads of what was projected; ``rotated`` says that an earlier call had it, and turned what is turned in place."""
    rows = _split(projected, turn)
    in_place = turn.layout is not None and (turn.rotates_first or not turn.norms)
    if in_place and not rotated:
        _rotate(rows, turn, cos, sin, batch)
    rstd = []
    for place, norm in enumerate(turn.norms):
        x = rows[place]
        y, _, r = rms_norm.forward(_narrow(x, norm), norm.weight, norm.eps, norm.form, dtype=x.dtype)
        rows[place] = y.view(x.shape)
        rstd.append(r)
    if not in_place and turn.layout is not None:
        _rotate(rows, turn, cos, sin, batch)
    q, k, v = (_as_heads(t, turn, batch) for t in rows)
    return Heads(q, k, v, projected, rstd)


def backward(
    dheads: tuple[torch.Tensor, ...], heads: Heads, turn: Turn, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """The gradients of what was projected, and of the weights of the norms: none, or two."""
    dq, dk, dv = dheads
    turns = turn.layout is not None
    if turns and not turn.rotates_first:
        dq, dk = _rotated_back(dq, dk, turn, cos, sin)
    rows, dnorms = [as_rows(dq), as_rows(dk), as_rows(dv)], []
    for place, (norm, x) in enumerate(zip(turn.norms, _split(heads.projected, turn), strict=False)):
        d, dnorm = rms_norm.backward(
            _narrow(rows[place], norm), None, _narrow(x, norm), norm.weight, heads.rstd[place], norm.form,
            weight_grad=norm.trained,
        )  # fmt: skip
        rows[place] = d.view(x.shape)
        dnorms.append(dnorm)
    if turns and turn.rotates_first:
        dq, dk = (_as_heads(t, turn, dv.shape[0]) for t in rows[:2])
        rows[:2] = [as_rows(t) for t in _rotated_back(dq, dk, turn, cos, sin)]
    return rows if len(heads.projected) == 3 else [torch.cat(rows, dim=1)], dnorms


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, dim]`` as ``[batch · tokens, heads · dim]``; a view in the order attention works in."""
    t = t.transpose(1, 2)
    return t.reshape(t.shape[0] * t.shape[1], -1)


def _as_heads(rows: torch.Tensor, turn: Turn, batch: int) -> torch.Tensor:
    return rows.view(batch, -1, rows.shape[1] // turn.dim, turn.dim).transpose(1, 2)


def _split(projected: list[torch.Tensor], turn: Turn) -> list[torch.Tensor]:
    """Rows of queries, of keys and of values."""
    if len(projected) == 3:
        return list(projected)
    (whole,) = projected
    rest = (whole.shape[1] - turn.width) // 2
    return list(whole.split([turn.width, rest, rest], dim=1))


def _narrow(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    """What the norm sees as its rows: heads, or all of them."""
    return rows.reshape(-1, norm.weight.shape[0])


def _rotate(rows: list[torch.Tensor], turn: Turn, cos: torch.Tensor, sin: torch.Tensor, batch: int) -> None:
    assert turn.layout is not None
    q, k = (_as_heads(t, turn, batch) for t in rows[:2])
    rope.rotate(q, k, cos, sin, turn.layout, out=(q, k))


def _rotated_back(
    dq: torch.Tensor, dk: torch.Tensor, turn: Turn, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    assert turn.layout is not None
    return rope.rotate(dq, dk, cos, sin, turn.layout, backward=True)
