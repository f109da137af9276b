"""Proof that our function may stand in for a model's own decoder layer; see :mod:`.selfcheck`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import (
    attention,
    decoder_layer,
    decoder_mlp,
    fp8,
    fp8_projection,
    glu,
    heads,
    layers,
    lora_add,
    lora_glu,
    nf4,
    projection,
    residual,
    rms_norm,
    rope,
    selfcheck,
    weight_gradient,
    wide,
)
from .decoder_layer import Layer
from .fp8 import FP8
from .launch import INTERPRETED
from .nf4 import NF4
from .projection import Projection
from .residual import Norm
from .selfcheck import Verdict

_SOURCES = tuple(
    str(m.__file__)
    for m in (
        decoder_layer,
        decoder_mlp,
        attention,
        heads,
        residual,
        projection,
        fp8_projection,
        lora_add,
        lora_glu,
        glu,
        rms_norm,
        rope,
        nf4,
        fp8,
        layers,
        weight_gradient,
        wide,
    )
)
#: How far from float64 a layer's own code may lie before our float64 composition is another function than it.
_SAME = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
#: The same where inputs are rounded to e4m3, each by 2.6% or so.
_SAME_8_BIT = 0.2

#: Where errors are a few roundings of a long sum, which of two lies closer is luck. The interpreter cuts fp32 to bf16
#: where a GPU rounds, some ten times in a row here.
_FLOOR = {torch.float32: 5e-6, torch.float16: 1e-4, torch.bfloat16: 3e-2 if INTERPRETED else 5e-4}


def recognise(module: Any, dtype: torch.dtype, policy: decoder_layer.Policy, *, parks: bool) -> layers.Found | str:
    """What the layer is, and proven to be; or why it is left as it is.

    That a layer makes no use of its rotary tables (SmolLM 3, EXAONE 4) is not to be seen; it shows in what it computes.
    """
    found = layers.found(module, dtype, policy, parks=parks)
    if isinstance(found, str):
        return found
    verdict = prove(module, found, dtype)
    if verdict.ok:
        return found
    unturned = replace(found, layout=None)
    return unturned if prove(module, unturned, dtype).ok else verdict.why


def prove(module: Any, what: layers.Found, dtype: torch.dtype) -> Verdict:
    """Our function, the layer's own forward and float64, on a short random input with random adapters.

    Adapters' B starts at zero, which would hide every error of A, and norms' weights at one; random ones take their
    place for the moment, as they do for biases. Matrices that are trained are their own.
    """
    device = next(module.parameters()).device
    length = 8 if INTERPRETED else 128
    width, head = int(module.self_attn.o_proj.out_features), int(module.self_attn.head_dim)
    stream = layers.stream(module, dtype)
    x = selfcheck._random((1, length, width), stream, device)
    angles = selfcheck._random((1, length, head // 2), torch.float32, device, seed=3)
    angles = torch.cat((angles, angles), dim=-1)
    tables = (angles.cos().to(stream), angles.sin().to(stream))

    with _training(module), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        built = layers.build(module, what, x)
    if isinstance(built, str):
        return Verdict(False, built)  # as it stands now: nothing to remember
    layer, trained = built

    def trial() -> Verdict:
        names = {id(p): name for name, p in module.named_parameters()}
        places = [names[id(p)] for p in trained]
        own = {id(part.weight) for part in layer.projections}
        fresh = [p.detach() if id(p) in own else _anew(p, 7 + i) for i, p in enumerate(trained)]
        for norm, weight in zip((norm for norm in layer.norms.there.values() if norm.trained), fresh, strict=False):
            weight.add_(0.0 if norm.form == "one-plus" else 1.0)

        def ours(x: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
            return decoder_layer.decoder_layer(x, tables, None, layer.filled(leaves), leaves)

        def stock(x: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
            with _training(module), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                swapped = dict(zip(places, leaves, strict=True))
                options = {"attention_mask": None, "position_embeddings": tables}
                out = torch.func.functional_call(module, swapped, (x,), options)
            if not isinstance(out, torch.Tensor):
                raise TypeError(f"the layer returns a {type(out).__name__}")
            return out

        def exact(x: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
            return reference(x, tables, layer, leaves)

        with torch.no_grad():
            truth = exact(x.double(), *(t.double() for t in fresh))
            distance = selfcheck._relative_error(stock(x, *fresh), truth)
        packed = any(isinstance(part.weight, FP8) for part in layer.projections)
        if not distance < (_SAME_8_BIT if packed else _SAME[dtype]):
            return Verdict(False, f"it computes something else than a plain decoder layer ({distance:.1e} apart)")
        # Inputs that differ by one rounding are rounded to e4m3 otherwise: two draws of one error.
        floor = 2e-2 if packed else _FLOOR[dtype]
        return selfcheck.compare(ours, stock, exact, [x, *fresh], floor=floor)

    shape = " ".join(str(item) for item in (dtype, what, layer.fuses, layers.kind(module), selfcheck.origins(module)))
    return selfcheck.proven("decoder_layer", _SOURCES, device, shape, trial)


def reference(
    x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], layer: Layer, trained: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The layer in plain PyTorch, without a mask; float64 in gives float64 arithmetic. ``trained`` as in ours."""
    layer = layer.filled(trained)
    left = list(trained)[sum(norm.trained for norm in layer.norms.there.values()) :]

    def linear(x: torch.Tensor, part: Projection) -> torch.Tensor:
        weight = part.weight
        if isinstance(weight, NF4):
            weight = nf4.dequantise(weight)
        elif isinstance(weight, FP8):
            weight = fp8.dequantise(weight)
        bias = part.bias.to(x.dtype) if part.bias is not None else None
        y = nn.functional.linear(x, weight.to(x.dtype), bias)
        mine = [left.pop(0).to(x.dtype) for _ in range(part.tensors)]
        if part.rank:
            a, b = mine
            y = y + nn.functional.linear(nn.functional.linear(x, a), b) * part.scaling
        return y

    def normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        if norm is None:
            return x
        narrow = x.unflatten(-1, (-1, norm.weight.shape[0]))
        return rms_norm.rms_norm_reference(narrow, norm.weight.to(x.dtype), norm.eps, norm.form).flatten(-2)

    def as_heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)

    def turned(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        if layer.layout is None:
            return [q, k]
        cos, sin = (table.to(q.dtype) for table in tables)
        q, k = rope.rope_reference(as_heads(q), as_heads(k), cos, sin, layer.layout)
        return [t.transpose(1, 2).flatten(2) for t in (q, k)]

    norms = layer.norms
    n1 = normed(x, norms.before_attention)
    queries = layer.o.in_features
    made = torch.cat([linear(n1, part) for part in layer.qkv], dim=-1)
    q, k, v = made.split([queries, *[(made.shape[-1] - queries) // 2] * 2], dim=-1)
    if layer.rotates_first:
        q, k = turned(q, k)
    q, k = normed(q, norms.queries), normed(k, norms.keys)
    if not layer.rotates_first:
        q, k = turned(q, k)
    q, k, v = (as_heads(t) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale)
    o = linear(out.transpose(1, 2).flatten(2), layer.o)
    s = x + layer.residual * normed(o, norms.after_attention)
    n2 = normed(s, norms.before_mlp)
    gate, up = torch.cat([linear(n2, part) for part in layer.gate_up], dim=-1).chunk(2, dim=-1)
    u = linear(glu.glu_reference(gate, up, layer.activation), layer.down)
    return s + layer.residual * normed(u, norms.after_mlp)


def _anew(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Random values of about the size that an adapter's, or a bias's, have."""
    scale = tensor.shape[1] ** -0.5 if tensor.dim() == 2 else 0.2
    return (selfcheck._random(tensor.shape, torch.float32, tensor.device, seed=seed) * scale).to(tensor.dtype)


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    before = module.training
    module.train(True)
    try:
        yield
    finally:
        module.train(before)
