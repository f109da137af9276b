"""Weights that stand in for others while a model is looked at that is not on the device yet.

Kernels are put on a model by running its modules on the device, and a model that is split over several devices is never
whole on one. So for as long as it is looked at, all parameters of one shape and dtype lie in one random tensor on the
device: what a kernel is proven for is a module's code, shapes and formats, not the values of its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .nf4_tensors import TABLES, bind, laid_open, stand_in_tables


@contextlib.contextmanager
def stood_in(model: Any, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """In the block, every parameter of ``model`` is on ``device``; packed weights can be read as they can once split.

    Args:
        dtype: that in which the floating-point ones are computed with; None is their own.
    """
    kept = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    packed = [(layer, layer._buffers[TABLES]) for layer in laid_open(model)]
    values: dict[tuple[Any, ...], torch.Tensor] = {}
    made: dict[int, nn.Parameter] = {}
    generator = torch.Generator(device).manual_seed(0)

    def like(p: nn.Parameter) -> nn.Parameter:
        form = dtype if dtype is not None and p.is_floating_point() else p.dtype
        kind = tuple(p.shape), form
        if kind not in values:
            if not form.is_floating_point:  # packed
                drawn = torch.randint(256, p.shape, dtype=form, generator=generator, device=device)
            elif p.dim() < 2:  # norms and biases
                drawn = torch.ones(p.shape, device=device)
            else:
                drawn = torch.randn(p.shape, generator=generator, device=device) * p.shape[-1] ** -0.5
            values[kind] = drawn.to(form)
        if id(p) not in made:  # one for each, over the same memory: who they are is looked at too
            made[id(p)] = nn.Parameter(values[kind], requires_grad=p.requires_grad)
        return made[id(p)]

    try:
        for module, name, parameter in kept:
            module._parameters[name] = like(parameter)
        for layer, _ in packed:
            layer._buffers[TABLES] = stand_in_tables(layer, device)
            bind(layer)
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter
        for layer, tables in packed:
            layer._buffers[TABLES] = tables
