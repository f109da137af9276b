"""A whole decoder layer as one autograd function, with a choice of what it keeps for its backward pass.

    n₁ = norm(x)        q, k, v = n₁·W_qkv      q, k = rope(norm(q), norm(k))
    o  = attention(q, k, v)·W_o                                                 s = x + m·norm(o)
    n₂ = norm(s)        u  = (f(n₂·W_gate) · (n₂·W_up))·W_down                  y = s + m·norm(u)

A family has some of these norms: Llama, Mistral and Qwen 2 those of n₁ and n₂, Qwen 3 those of queries and keys too,
Gemma 3 all six, OLMo 2 and EXAONE 4 all but n₁ and n₂. Every W is frozen, frozen with a LoRA adapter, or trained, with
its bias; so may the norms' weights be. The backward pass makes the gradients of x and of what is trained, and of
nothing else. It is written by hand for three reasons: what an elementwise step can make again from its inputs is never
kept, and every input of a trained W is such a thing or kept anyway; what has been used is overwritten; and where no
norm stands after the MLP, the layer's output is not needed for its gradients, so the down projection, a quarter of the
layer's arithmetic, is never computed twice, as checkpointing a layer as a black box does.

What is kept between the passes, in bytes per token for 16-bit values (H hidden, I MLP width, Q and K the widths of
queries and of keys; besides, 2 per rank of each group of adapters and 4 per head):

====================  ============================  =====================================================
policy                kept                          computed again in backward
====================  ============================  =====================================================
inputs                2 H                           all but the down projection
inputs+attention      4 H + 2 Q                     the projections to q, k, v, gate and up
all-but-elementwise   4 H + 4 Q + 4 K + 4 I         norms, rotary embedding, activation
====================  ============================  =====================================================

A norm after attention needs o for its gradient; o is kept in place of s, which is x and the normed o in one elementwise
step, so it costs nothing. One after the MLP needs u: 2 H more under ``all-but-elementwise``, and under the others the
down projection too is computed again, since u would double what ``inputs`` keeps.

Nobody looks at what the last layer makes of a position without a label: what comes after its attention is computed for
the others alone (:class:`Needed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from . import attention, decoder_mlp, glu, heads, offload, rope
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
from .residual import Join, Joined, Norm, join, join_again, join_gradient, normed, normed_gradient

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
class Norms:
    """A layer's norms by where they stand; None where there is none. Those of queries and keys are both or none."""

    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    queries: Norm | None = None
    keys: Norm | None = None

    @cached_property
    def there(self) -> dict[str, Norm]:
        """Those that there are, by their places."""
        all_of_them = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {place: norm for place, norm in all_of_them if norm is not None}


@dataclass(frozen=True)
class Layer:
    """One decoder layer, but for its adapters.

    Args:
        qkv: three projections, or one for all three; gate_up: two, or one.
        scale: of the products of queries and keys.
        layout: of the rotary embedding; None without one.
        dtype: of its products; hidden states may be wider.
        residual: what is added to the hidden states is multiplied by it.
        rotates_first: queries and keys are normed after the rotary embedding.
        window: of attention within documents; see :func:`.attention.attend`.
        policy: what is kept for the backward pass.
        parks: what is kept of ``inputs+attention`` waits in host memory; see :mod:`.offload`.
        fuses: as in :class:`.decoder_mlp.MLP`.
    """

    norms: Norms
    qkv: tuple[Projection, ...]
    o: Projection
    gate_up: tuple[Projection, ...]
    down: Projection
    head_dim: int
    scale: float
    activation: glu.Activation
    layout: rope.Layout | None
    dtype: torch.dtype
    residual: float = 1.0
    rotates_first: bool = False
    window: int | None = None
    policy: Policy = "inputs+attention"
    parks: bool = False
    fuses: bool = True

    @property
    def groups(self) -> tuple[tuple[Projection, ...], ...]:
        """The projections by their inputs."""
        return self.qkv, (self.o,), self.gate_up, (self.down,)

    @cached_property
    def projections(self) -> tuple[Projection, ...]:
        return (*self.qkv, self.o, *self.gate_up, self.down)

    @cached_property
    def turn(self) -> heads.Turn:
        norms, width = self.norms, self.o.in_features
        return heads.Turn(self.head_dim, width, self.layout, norms.queries, norms.keys, self.rotates_first)

    @cached_property
    def join(self) -> Join:
        """How attention joins the hidden states."""
        return Join(self.norms.after_attention, self.residual)

    @cached_property
    def mlp(self) -> decoder_mlp.MLP:
        after = Join(self.norms.after_mlp, self.residual)
        return decoder_mlp.MLP(self.norms.before_mlp, after, self.activation, self.dtype, self.fuses)

    def filled(self, trained: Sequence[torch.Tensor]) -> Layer:
        """The same with other tensors where it is trained itself; ``trained`` as :func:`decoder_layer` takes it."""
        left = iter(trained)
        own = self.norms.there.items()
        norms = {place: replace(norm, weight=next(left)) for place, norm in own if norm.trained}

        def fill(part: Projection) -> Projection:
            mine = [next(left) for _ in range(part.tensors)]
            return replace(part, weight=mine[0], bias=mine[1] if mine[1:] else None) if part.trained else part

        qkv, (o,), gate_up, (down,) = (tuple(fill(part) for part in group) for group in self.groups)
        return replace(self, norms=replace(self.norms, **norms), qkv=qkv, o=o, gate_up=gate_up, down=down)


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
        trained: the weights of the norms that are trained, in the order of :class:`Norms`; then, projection by
            projection, A ``[rank, in]`` and B ``[out, rank]`` of its adapter, or its own weight and bias if it is
            trained itself.
        needed: rows of the output that are looked at; all others are zero, and their gradients are not.

    Its backward writes over what it kept, so it runs once per forward. Gradients of trained weights may be added to
    ``.grad`` without autograd's help; see :mod:`.weight_gradient`.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _DecoderLayer.apply(x, *tables, mask, documents, needed, layer, *trained)


@dataclass
class _Kept:
    """What waits for the backward pass; None is made again. Rows are ``[tokens, columns]``.

    ``out`` is attention's, ``[batch, tokens, heads, dim]``. One of ``s`` and ``o`` is None.
    """

    x: torch.Tensor | None
    groups: tuple[Group, Group, Group, Group]
    small: tuple[torch.Tensor | None, ...] = ()
    attended: attention.Attended | None = None
    out: torch.Tensor | None = None
    s: torch.Tensor | None = None
    o: torch.Tensor | None = None
    projected: list[torch.Tensor] | None = None
    mlp: decoder_mlp.Kept | None = None
    parked: list[tuple[tuple[str, ...], offload.Parked]] = field(default_factory=list)

    def park(self) -> None:
        """Send what is kept to the host: last, and by itself, what the MLP's backward needs, which comes first."""
        for names in (("x", "out"), ("s",)) if self.o is None else (("out",), ("x", "o")):
            self.parked.append((names, offload.park([getattr(self, name) for name in names])))
            for name in names:
                setattr(self, name, None)

    def unpark(self) -> None:
        """Have back what was sent last; what was sent before is on its way then."""
        if self.parked:
            names, parcel = self.parked.pop()
            for name, tensor in zip(names, parcel.take(), strict=True):
                setattr(self, name, tensor)


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None,
        documents: attention.Documents | None, needed: Needed | None, layer: Layer, *trained: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        rows = as_rows(x)
        groups = _groups(layer, _adapters(layer, trained), x.device)
        qkv, only_o, mlp, only_down = groups
        kept = _Kept(rows, groups)

        n1, _ = normed(rows, layer.norms.before_attention, layer.dtype)
        xa = shrink(n1, qkv)
        made = heads.forward(project(n1, xa, qkv), layer.turn, cos, sin, x.shape[0])
        del n1
        out, attended = attention.attend(made.q, made.k, made.v, mask, layer.scale, documents, layer.window)
        narrow = _needed(heads.as_rows(out), needed)
        oa = shrink(narrow, only_o)
        s, o, _ = join(_needed(rows, needed), narrow, oa, only_o, layer.join)
        if layer.policy != "inputs":
            kept.attended, kept.out = attended, out.transpose(1, 2)
            kept.s, kept.o = (s, None) if o is None else (None, o)
        if layer.policy == "all-but-elementwise":
            kept.projected = made.projected
        y = torch.empty_like(s) if kept.s is s else s
        if layer.parks:
            kept.park()  # beside the MLP, which is long enough
        del made, attended, out, narrow, o

        keeps_all = layer.policy == "all-but-elementwise"
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
        norms, turn, total = layer.norms, layer.turn, shape[0] * shape[1]
        kept.unpark()
        cos, sin, mask = ctx.saved_tensors
        qkv, only_o, mlp, only_down = kept.groups
        xa, oa = kept.small

        n1 = made = None
        if layer.policy == "inputs":
            n1, rstd1 = normed(kept.x, norms.before_attention, layer.dtype)
            made = heads.forward(project(n1, xa, qkv), turn, cos, sin, shape[0])
            seen = (layer.scale, ctx.documents, layer.window)
            out, kept.attended = attention.attend(made.q, made.k, made.v, mask, *seen)
            narrow, kept.out = _needed(heads.as_rows(out), needed), out.transpose(1, 2)
            s, o, rstd_o = join(_needed(kept.x, needed), narrow, oa, only_o, layer.join)
            del out, narrow
        elif kept.o is not None:
            s, o, rstd_o = join_again(_needed(kept.x, needed), kept.o, layer.join)
        else:
            s, o, rstd_o = Joined(kept.s)
        kept.s = kept.o = None
        dy = as_rows(dy) if needed is None else needed.of(as_rows(dy), gradient=True)
        kept_mlp, kept.mlp = kept.mlp, None
        ds, mlp_pairs, dnorms_mlp = decoder_mlp.backward(dy, s, kept_mlp, layer.mlp, mlp, only_down)
        del s, kept_mlp
        kept.unpark()
        x, out = kept.x, kept.out.transpose(1, 2)

        weights = dense([part.weight for part in (*layer.qkv, layer.o)], layer.dtype)
        do, dafter = join_gradient(ds, o, rstd_o, layer.join, layer.dtype)
        del o
        doa, o_bs = expand_gradients([do], oa, only_o)
        o_as = shrink_gradients(doa, _needed(heads.as_rows(out), needed), only_o, [do])
        dout = input_gradient([do], doa, only_o, weights[-1:])
        del do
        if needed is not None:
            dout, ds = needed.among(dout, total), needed.among(ds, total)
        if n1 is None or made is None:
            n1, rstd1 = normed(x, norms.before_attention, layer.dtype)
            projected = kept.projected or project(n1, xa, qkv, weights[:-1])
            made = heads.forward(projected, turn, cos, sin, shape[0], rotated=kept.projected is not None)
            kept.projected = None
            del projected
            if layer.parks:
                n1 = None  # made a third time sooner than held through the attention's gradients, the crest of a step
        dout = dout.view(*shape[:2], -1, layer.head_dim).transpose(1, 2)
        dheads = attention.gradients(kept.attended, made.q, made.k, made.v, out, dout)
        kept.out = kept.attended = None
        del dout, out
        dys, dnorms_inner = heads.backward(dheads, made, turn, cos, sin)
        del made, dheads
        if n1 is None:
            n1, rstd1 = normed(x, norms.before_attention, layer.dtype)
        dxa, bs = expand_gradients(dys, xa, qkv)
        as_ = shrink_gradients(dxa, n1, qkv, dys)
        dx = dbefore = None
        if ctx.needs_input_grad[0] or (norms.before_attention is not None and norms.before_attention.trained):
            dn1 = input_gradient(dys, dxa, qkv, weights[:-1], out=None if n1 is x else n1)
            dx, dbefore = normed_gradient(dn1, ds, x, norms.before_attention, rstd1)
            dx = dx.view(shape)
        dnorms = dict(zip(("before_mlp", "after_mlp", "queries", "keys"), (*dnorms_mlp, *dnorms_inner), strict=False))
        dnorms |= {"before_attention": dbefore, "after_attention": dafter}
        flat = [dnorms[place] for place, norm in norms.there.items() if norm.trained]
        pairs = [*zip(as_, bs, strict=True), *zip(o_as, o_bs, strict=True), *mlp_pairs]
        for part, pair in zip(layer.projections, pairs, strict=True):
            flat += pair[: part.tensors]
        made_in = zip(flat, ctx.trained, strict=True)
        return dx, None, None, None, None, None, None, *(g if g is None else g.to(dtype) for g, (dtype, *_) in made_in)


def _adapters(layer: Layer, trained: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A and B of each adapter, out of all that is trained."""
    start = sum(norm.trained for norm in layer.norms.there.values())
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
    order = [*adapters[::2], *adapters[1::2]]
    flat = torch.empty(sum(tensor.numel() for tensor in order), dtype=layer.dtype, device=device)
    copies = torch._utils._unflatten_dense_tensors(flat, order) if order else ()
    if order:
        torch._foreach_copy_(copies, order)
    bs = iter(copies[len(order) // 2 :])
    start, groups = 0, []
    for members in layer.groups:
        rank, width = sum(part.rank for part in members), members[0].in_features
        stacked = flat.as_strided((rank, width), (width, 1), start) if rank else None
        start += rank * width
        groups.append(Group(members, stacked, tuple(next(bs) if part.rank else None for part in members)))
    return groups[0], groups[1], groups[2], groups[3]
