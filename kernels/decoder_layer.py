"""A whole decoder layer (Llama, Mistral, Qwen 2 and 3) as one autograd function, with a choice of what it keeps.

    n₁ = norm(x)        q, k, v = n₁·W_qkv      q, k = rope(norm(q), norm(k))      (the inner norms are Qwen 3's)
    o  = attention(q, k, v)                     s = x + o·W_o
    n₂ = norm(s)        h = f(n₂·W_gate) · (n₂·W_up)                               y = s + h·W_down

Every W is frozen, frozen with a LoRA adapter, or trained, with its bias; so may the norms' weights be. The backward
pass makes the gradients of x and of what is trained, and of nothing else. It is written by hand for three reasons: what
an elementwise step can make again from its inputs is never kept, and every input of a trained W is such a thing or kept
anyway; what has been used is overwritten; and the layer's output is not needed for its gradients, so the down
projection, a quarter of the layer's arithmetic, is never computed twice, as checkpointing a layer as a black box does.

What is kept between the passes, in bytes per token for 16-bit values (H hidden, I MLP width, Q and K the widths of
queries and of keys; besides, 2 per rank of each group of adapters and 4 per head):

====================  ============================  =====================================================
policy                kept                          computed again in backward
====================  ============================  =====================================================
inputs                2 H                           all but the down projection
inputs+attention      4 H + 2 Q                     the projections to q, k, v, gate and up
all-but-elementwise   4 H + 4 Q + 4 K + 4 I         norms, rotary embedding, activation
====================  ============================  =====================================================

Nobody looks at what the last layer makes of a position without a label: what comes after its attention is computed for
the others alone (:class:`Needed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from . import attention, decoder_mlp, glu, offload, rms_norm, rope
from .decoder_mlp import Norm, normed
from .launch import as_rows
from .projection import (
    Group,
    Projection,
    dense,
    expand_gradients,
    input_gradient,
    project,
    shrink,
    shrink_gradients,
)

#: What a layer keeps for its backward pass, least first.
Policy = Literal["inputs", "inputs+attention", "all-but-elementwise"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class Keeping:
    """What the layers of a model keep.

    Args:
        policy: of all layers but the last ``whole``, which keep all but elementwise results.
        parks: what is kept of ``inputs+attention`` waits in host memory; see :mod:`.offload`.
    """

    policy: Policy = "all-but-elementwise"
    whole: int = 0
    parks: bool = False

    def of(self, place: int, layers: int) -> tuple[Policy, bool]:
        """Policy and parking of one of so many layers."""
        if place >= layers - self.whole:
            return "all-but-elementwise", False
        return self.policy, self.parks and self.policy == "inputs+attention"


@dataclass(frozen=True)
class Layer:
    """One decoder layer, but for its adapters.

    Args:
        projections: q, k, v, o, gate, up and down.
        scale: of the products of queries and keys.
        dtype: of its products; hidden states may be wider.
        q_norm, k_norm: over each head, or None; both or none.
        policy: what is kept for the backward pass.
        parks: what is kept of ``inputs+attention`` waits in host memory; see :mod:`.offload`.
        fuses: as in :class:`.decoder_mlp.MLP`.
    """

    norm1: Norm
    norm2: Norm
    projections: tuple[Projection, ...]
    head_dim: int
    scale: float
    activation: glu.Activation
    layout: rope.Layout
    dtype: torch.dtype
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    policy: Policy = "inputs+attention"
    parks: bool = False
    fuses: bool = True

    @property
    def mlp(self) -> decoder_mlp.MLP:
        return decoder_mlp.MLP(self.norm2, self.activation, self.dtype, self.fuses)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """That of the input, of the sum after attention, and those of queries and keys."""
        inner = () if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        return (self.norm1, self.norm2, *inner)

    def filled(self, trained: Sequence[torch.Tensor]) -> Layer:
        """The same with other tensors where it is trained itself; ``trained`` as :func:`decoder_layer` takes it."""
        left = iter(trained)
        norms = [replace(norm, weight=next(left)) if norm.trained else norm for norm in self.norms]
        parts = []
        for part in self.projections:
            mine = [next(left) for _ in range(part.tensors)]
            parts.append(replace(part, weight=mine[0], bias=mine[1] if mine[1:] else None) if part.trained else part)
        q_norm, k_norm = norms[2:] or (None, None)
        return replace(self, norm1=norms[0], norm2=norms[1], projections=tuple(parts), q_norm=q_norm, k_norm=k_norm)


@dataclass(frozen=True)
class Needed:
    """The rows of a layer's output that anybody looks at.

    Args:
        rows: int64 ``[count]``, ascending; those past the last row of the batch stand for none.
    """

    rows: torch.Tensor

    def of(self, whole: torch.Tensor, *, gradient: bool = False) -> torch.Tensor:
        """These rows; as a gradient, zero where they stand for none."""
        taken = whole.index_select(0, self.rows.clamp_max(whole.shape[0] - 1))
        return taken.masked_fill_((self.rows >= whole.shape[0])[:, None], 0) if gradient else taken

    def among(self, taken: torch.Tensor, total: int) -> torch.Tensor:
        """These rows in their places, zeros in all others."""
        whole = torch.zeros(total + 1, taken.shape[1], dtype=taken.dtype, device=taken.device)
        return whole.index_copy_(0, self.rows.clamp_max(total), taken)[:-1]


def decoder_layer(
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    layer: Layer,
    trained: Sequence[torch.Tensor],
    documents: attention.Documents | None = None,
    needed: Needed | None = None,
) -> torch.Tensor:
    """The layer's output, ``[batch, tokens, hidden]`` like x.

    Args:
        x: in the layer's dtype, or in fp32.
        tables: cosines and sines, ``[batch or 1, tokens, rotary]``.
        mask: None for plain causal attention, else as the stock operation takes it.
        documents: sequences that share rows; attention stays within each, and the mask is not used.
        trained: the weights of the norms that are trained; then, projection by projection, A ``[rank, in]`` and B
            ``[out, rank]`` of its adapter, or its own weight and bias if it is trained itself.
        needed: rows of the output that are looked at; all others are zero, and their gradients are not.

    Its backward writes over what it kept, so it runs once per forward. Gradients of trained weights may be added to
    ``.grad`` without autograd's help; see :mod:`.weight_gradient`.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _DecoderLayer.apply(x, *tables, mask, documents, needed, layer, *trained)


@dataclass
class _Kept:
    """What waits for the backward pass; None is made again. Rows are ``[tokens, columns]``."""

    x: torch.Tensor | None
    groups: tuple[Group, Group, Group, Group]
    small: tuple[torch.Tensor | None, ...] = ()
    attended: attention.Attended | None = None
    out: torch.Tensor | None = None
    s: torch.Tensor | None = None
    projected: list[torch.Tensor] | None = None
    mlp: decoder_mlp.Kept | None = None
    parked: list[offload.Parked] = field(default_factory=list)

    def park(self) -> None:
        """Send x and the attention's output to the host, and s by itself: it is needed back first, and alone."""
        assert self.x is not None
        assert self.out is not None
        assert self.s is not None
        self.parked = [offload.park([self.x, self.out.transpose(1, 2)]), offload.park([self.s])]
        self.x = self.out = self.s = None

    def unpark_sum(self) -> None:
        """Have s back; x and the attention's output are on their way then."""
        if self.parked:
            (self.s,) = self.parked.pop().take()

    def unpark(self) -> torch.Tensor:
        """Have these back; returns x."""
        if self.parked:
            self.x, out = self.parked.pop().take()
            self.out = out.transpose(1, 2)
        assert self.x is not None
        return self.x


@dataclass
class _Heads:
    """Queries, keys and values ``[batch, heads, tokens, dim]`` as attention takes them.

    ``projected`` is what they were made of, as rows: normed queries and keys are new tensors, others the same ones
    rotated in place.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    projected: list[torch.Tensor]
    rstd: list[torch.Tensor]


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None,
        documents: attention.Documents | None, needed: Needed | None, layer: Layer, *trained: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        batch = x.shape[0]
        rows = as_rows(x)
        groups = _groups(layer, _adapters(layer, trained), x.device)
        qkv, only_o, mlp, only_down = groups
        kept = _Kept(rows, groups)

        n1, _ = normed(rows, layer.norm1, layer.dtype)
        xa = shrink(n1, qkv)
        heads = _heads(project(n1, xa, qkv), layer, cos, sin, batch, rotated=False)
        del n1
        out, attended = attention.attend(heads.q, heads.k, heads.v, mask, layer.scale, documents)
        o = _needed(_head_rows(out), needed)
        oa = shrink(o, only_o)
        (s,) = project(o, oa, only_o, add=_needed(rows, needed))
        if layer.policy != "inputs":
            kept.attended, kept.out, kept.s = attended, out, s
        if layer.policy == "all-but-elementwise":
            kept.projected = heads.projected
        if layer.parks:
            kept.park()  # beside the MLP, which is long enough
        del heads, attended, out, o

        keeps_all = layer.policy == "all-but-elementwise"
        y = s if layer.policy == "inputs" else torch.empty_like(s)
        kept.mlp = decoder_mlp.forward(s, y, layer.mlp, mlp, only_down, keep=keeps_all)
        kept.small = (xa, oa)
        if needed is not None:
            y = needed.among(y, rows.shape[0])
        ctx.layer, ctx.kept, ctx.documents, ctx.needed = layer, kept, documents, needed
        ctx.save_for_backward(cos, sin, mask)
        ctx.trained = [(tensor.dtype, tensor, tensor._version) for tensor in trained]
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        if ctx.kept is None:
            raise RuntimeError("a fused layer was asked for its gradient twice; what it kept is overwritten")
        kept, ctx.kept = ctx.kept, None
        if any(tensor._version != version for _, tensor, version in ctx.trained):
            raise RuntimeError("a weight of a fused layer was changed between its forward and its backward")
        layer, needed, shape = ctx.layer, ctx.needed, dy.shape
        kept.unpark_sum()
        cos, sin, mask = ctx.saved_tensors
        qkv, only_o, mlp, only_down = kept.groups
        xa, oa = kept.small

        n1 = heads = None
        if layer.policy == "inputs":
            x = kept.unpark()
            n1, rstd1 = normed(x, layer.norm1, layer.dtype)
            heads = _heads(project(n1, xa, qkv), layer, cos, sin, shape[0], rotated=False)
            kept.out, kept.attended = attention.attend(heads.q, heads.k, heads.v, mask, layer.scale, ctx.documents)
            (kept.s,) = project(_needed(_head_rows(kept.out), needed), oa, only_o, add=_needed(x, needed))
        assert kept.mlp is not None
        assert kept.s is not None
        dy = as_rows(dy) if needed is None else needed.of(as_rows(dy), gradient=True)
        ds, mlp_pairs, dnorm2 = decoder_mlp.backward(dy, kept.s, kept.mlp, layer.mlp, mlp, only_down)
        kept.s = kept.mlp = None
        x = kept.unpark()

        weights = dense([part.weight for part in layer.projections[:4]], layer.dtype)
        assert kept.out is not None
        d = ds.to(layer.dtype)
        doa, o_bs = expand_gradients([d], oa, only_o)
        o_as = shrink_gradients(doa, _needed(_head_rows(kept.out), needed), only_o, [d])
        do = input_gradient([d], doa, only_o, weights[3:])
        del d
        if needed is not None:
            do, ds = needed.among(do, x.shape[0]), needed.among(ds, x.shape[0])
        if n1 is None or heads is None:
            n1, rstd1 = normed(x, layer.norm1, layer.dtype)
            projected = kept.projected or project(n1, xa, qkv, weights[:3])
            heads = _heads(projected, layer, cos, sin, shape[0], rotated=kept.projected is not None)
            kept.projected = None
            if layer.parks:
                n1 = None  # made a third time sooner than held through the attention's gradients, the crest of a step
        do = do.view(*shape[:2], -1, layer.head_dim).transpose(1, 2)
        dheads = attention.gradients(kept.attended, heads.q, heads.k, heads.v, kept.out, do)
        del do
        kept.out = kept.attended = None
        dys, inner_norms = _heads_backward(dheads, heads, layer, cos, sin)
        del heads, dheads
        if n1 is None:
            n1, rstd1 = normed(x, layer.norm1, layer.dtype)
        dxa, bs = expand_gradients(dys, xa, qkv)
        as_ = shrink_gradients(dxa, n1, qkv, dys)
        dx = dnorm1 = None
        if ctx.needs_input_grad[0] or layer.norm1.trained:
            dn1, norm = input_gradient(dys, dxa, qkv, weights[:3], out=n1), layer.norm1
            dx, dnorm1 = rms_norm.backward(dn1, ds, x, norm.weight, rstd1, norm.form, weight_grad=norm.trained)
            dx = dx.view(shape)
        pairs = [*zip(as_, bs, strict=True), *zip(o_as, o_bs, strict=True), *mlp_pairs]
        norms = zip(layer.norms, [dnorm1, dnorm2, *inner_norms], strict=True)
        flat = [gradient for norm, gradient in norms if norm.trained]
        for part, pair in zip(layer.projections, pairs, strict=True):
            flat += pair[: part.tensors]
        made = zip(flat, ctx.trained, strict=True)
        return dx, None, None, None, None, None, None, *(g if g is None else g.to(dtype) for g, (dtype, *_) in made)


def _adapters(layer: Layer, trained: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A and B of each adapter, out of all that is trained."""
    start = sum(norm.trained for norm in layer.norms)
    found: list[torch.Tensor] = []
    for part in layer.projections:
        found += trained[start : start + 2] if part.rank else ()
        start += part.tensors
    if start != len(trained):
        raise ValueError(f"{len(trained)} tensors were given, {start} are trained")
    return found


def _needed(rows: torch.Tensor, needed: Needed | None) -> torch.Tensor:
    return rows if needed is None else needed.of(rows)


def _groups(layer: Layer, adapters: Sequence[torch.Tensor], device: torch.device) -> tuple[Group, Group, Group, Group]:
    """The adapters in the dtype of products: copied in one launch, those of a group stacked."""
    parts = layer.projections
    order = [tensor.detach() for tensor in (*adapters[::2], *adapters[1::2])]
    sizes = [tensor.numel() for tensor in order]
    flat = torch.empty(sum(sizes), dtype=layer.dtype, device=device)
    copies = [piece.view(t.shape) for piece, t in zip(flat.split(sizes), order, strict=True)] if order else []
    if order:
        torch._foreach_copy_(copies, order)
    bs = iter(copies[len(order) // 2 :])
    start, groups = 0, []
    for members in (parts[:3], parts[3:4], parts[4:6], parts[6:]):
        rank, width = sum(part.rank for part in members), members[0].in_features
        stacked = flat[start : start + rank * width].view(rank, width) if rank else None
        start += rank * width
        groups.append(Group(members, stacked, tuple(next(bs) if part.rank else None for part in members)))
    return groups[0], groups[1], groups[2], groups[3]


def _heads(
    projected: list[torch.Tensor], layer: Layer, cos: torch.Tensor, sin: torch.Tensor, batch: int, *, rotated: bool
) -> _Heads:
    """Queries and keys normed, where the layer does, and turned; ``rotated`` says that plain ones are already."""
    q, k, v = (t.view(batch, -1, t.shape[1] // layer.head_dim, layer.head_dim) for t in projected)
    rstd: list[torch.Tensor] = []
    if layer.q_norm is not None and layer.k_norm is not None:
        q, _, q_rstd = rms_norm.forward(q, layer.q_norm.weight, layer.q_norm.eps, layer.q_norm.form, dtype=q.dtype)
        k, _, k_rstd = rms_norm.forward(k, layer.k_norm.weight, layer.k_norm.eps, layer.k_norm.form, dtype=k.dtype)
        rstd, rotated = [q_rstd, k_rstd], False
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if not rotated:
        rope.rotate(q, k, cos, sin, layer.layout, out=(q, k))
    return _Heads(q, k, v, projected, rstd)


def _heads_backward(
    dheads: tuple[torch.Tensor, ...], heads: _Heads, layer: Layer, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """The gradients of what was projected, as rows, and of the weights of the inner norms."""
    dq, dk = rope.rotate(dheads[0], dheads[1], cos, sin, layer.layout, backward=True)
    rows = [_head_rows(t) for t in (dq, dk, dheads[2])]
    dnorms: list[torch.Tensor | None] = []
    if layer.q_norm is not None and layer.k_norm is not None:
        for place, norm in enumerate((layer.q_norm, layer.k_norm)):
            x = heads.projected[place]
            narrow = (-1, layer.head_dim)
            d, dnorm = rms_norm.backward(
                rows[place].view(narrow), None, x.view(narrow), norm.weight, heads.rstd[place], norm.form,
                weight_grad=norm.trained,
            )  # fmt: skip
            rows[place] = d.view(x.shape)
            dnorms.append(dnorm)
    return rows, dnorms


def _head_rows(t: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, dim]`` as ``[batch · tokens, heads · dim]``; a view in the order attention works in."""
    t = t.transpose(1, 2)
    return t.reshape(t.shape[0] * t.shape[1], -1)
