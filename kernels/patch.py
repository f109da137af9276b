"""Put the kernels on a loaded model: found by structure and behaviour, replaced instance by instance.

A replacement is an instance's own ``forward``; no class, no function and no parameter of the model changes, so other
models in the process, checkpoints and adapters are untouched, and :func:`unpatch` takes it all back. Linear layers
are called as modules, so LoRA layers, quantised layers and hooks on them act as before.

A replacement runs only where it is proven: an input of a dtype, width or device that has not been checked is checked
on the spot, and the module's own forward runs if it fails.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from .replacement import STATE, PatchReport, Replacement

if TYPE_CHECKING:
    from .decoder_layer import Keeping

#: What can be replaced, in the order in which it is looked for: a whole layer is held against its own code, so before
#: its parts; the gated MLP builds on the LoRA layers in it.
KERNELS = ("decoder_layer", "lora", "rms_norm", "rope", "glu")


def patch_model(
    model: nn.Module,
    *,
    only: Collection[str] | None = None,
    dtype: torch.dtype | None = None,
    keeping: Keeping | None = None,
) -> PatchReport:
    """Replace what can be replaced on ``model``; safe to call again, as after adapters were added.

    Args:
        only: the kernels to use, of :data:`KERNELS`; all by default.
        dtype: the dtype in which the model computes; by default that of most of its parameters.
        keeping: what whole layers keep for their backward pass; by default all but elementwise results.

    Raises:
        ValueError: ``only`` names a kernel that there is not.
    """
    wanted = set(KERNELS if only is None else only)
    if unknown := wanted - set(KERNELS):
        raise ValueError(f"no such kernel: {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    report = PatchReport()
    try:
        from . import replace
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        report.items.append(Replacement("", "all", False, f"Triton can't be imported ({error})"))
        return report
    dtype = dtype or compute_dtype(model)
    _restore(model, wanted)  # what is patched already is looked at again in its own form
    for kernel in KERNELS:
        if kernel in wanted:
            if kernel == "decoder_layer":
                report.items.extend(replace.find_layers(model, dtype, keeping))
            else:
                report.items.extend(replace.FINDERS[kernel](model, dtype))
    for module in model.modules():
        if STATE in vars(module):
            vars(module)[STATE].fallback = ""  # what trial runs left there
    return report


def unpatch(model: nn.Module) -> int:
    """Give every replaced module its own forward back; returns how many there were."""
    return _restore(model, KERNELS)


def fallbacks(model: nn.Module) -> list[Replacement]:
    """Replaced modules whose own forward had to run after all, and why: worth asking after the first step.

    A wider dtype than expected is the usual cause. Rotary embeddings fall back without being listed.
    """
    patches = [(path, vars(module)[STATE]) for path, module in model.named_modules() if STATE in vars(module)]
    return [Replacement(path, patch.kernel, False, patch.fallback) for path, patch in patches if patch.fallback]


def _restore(model: nn.Module, kernels: Collection[str]) -> int:
    patched = [m for m in model.modules() if STATE in vars(m) and vars(m)[STATE].kernel in kernels]
    for module in patched:
        del module.forward, module.__dict__[STATE]
    return len(patched)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype that most parameters have; bf16 if all are quantised."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda d: sizes[d]) if sizes else torch.bfloat16
