"""Proof that our function may stand in for a model's own decoder layer; see :mod:`.selfcheck`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    layers,
    lora_glu,
    nf4,
    projection,
    rms_norm,
    rope,
    selfcheck,
    weight_gradient,
    wide,
)
from .fp8 import FP8
from .launch import INTERPRETED
from .selfcheck import Verdict

_SOURCES = tuple(
    str(m.__file__)
    for m in (
        decoder_layer,
        decoder_mlp,
        attention,
        projection,
        fp8_projection,
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


def prove(module: Any, what: layers.Found, dtype: torch.dtype) -> Verdict:
    """Our function, the layer's own forward and float64, on a short random input with random adapters.

    Adapters' B starts at zero, which would hide every error of A, and norms' weights at one; random ones take their
    place for the moment, as they do for biases. Matrices that are trained are their own.
    """
    device = module.input_layernorm.weight.device
    length = 8 if INTERPRETED else 128
    width, head = module.input_layernorm.weight.shape[0], int(module.self_attn.head_dim)
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
        for norm, weight in zip((norm for norm in layer.norms if norm.trained), fresh, strict=False):
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
            return layers.reference(x, tables, layer, leaves)

        with torch.no_grad():
            truth = exact(x.double(), *(t.double() for t in fresh))
            distance = selfcheck._relative_error(stock(x, *fresh), truth)
        packed = any(isinstance(part.weight, FP8) for part in layer.projections)
        if not distance < (_SAME_8_BIT if packed else _SAME[dtype]):
            return Verdict(False, f"it computes something else than a plain decoder layer ({distance:.1e} apart)")
        # Inputs that differ by one rounding are rounded to e4m3 otherwise: two draws of one error.
        floor = 2e-2 if packed else _FLOOR[dtype]
        return selfcheck.compare(ours, stock, exact, [x, *fresh], floor=floor)

    shape = " ".join(str(item) for item in (dtype, what, layer.fuses, layers.kind(module)))
    return selfcheck.proven("decoder_layer", _SOURCES, device, shape, trial)


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
