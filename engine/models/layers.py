"""What the layers of a model keep for their backward pass, as a plan's checkpointing says it.

=============  ===========================================  ==================================================
checkpointing  layers that are one function of ours         layers left to transformers
=============  ===========================================  ==================================================
``none``       keep all but what elementwise steps made     keep everything
``full``       keep their inputs                            keep their inputs
``offload``    keep their inputs and attention's outputs    keep their inputs, in host memory where transformers
               in host memory                               can do that
``selective``  the last ``kept_layers`` as under ``none``, the others as under ``full``
=============  ===========================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...planner.plan import Resolved
from ..events import Fallback

if TYPE_CHECKING:
    from ...kernels.decoder_layer import Keeping


def keeping(resolved: Resolved) -> Keeping:
    """For :func:`..kernels.patch.patch_model`."""
    from ...kernels.decoder_layer import Keeping

    if resolved.checkpointing == "none":
        return Keeping("all-but-elementwise")
    if resolved.checkpointing == "offload":
        return Keeping("inputs+attention", parks=True)
    return Keeping("inputs", whole=resolved.kept_layers if resolved.checkpointing == "selective" else 0)


def ours(model: Any) -> list[Any]:
    """The decoder layers of a model that run as one function of ours."""
    from ...kernels.replacement import STATE

    return [m for m in model.modules() if getattr(vars(m).get(STATE), "kernel", "") == "decoder_layer"]


def checkpoint_layers(model: Any, resolved: Resolved, emit: Callable[[Any], object]) -> None:
    """Have transformers compute again what layers that are no functions of ours made.

    It is set on the model, not through the trainer, which knows nothing of single layers.
    """
    if resolved.checkpointing == "none":
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    again, offload = {"use_reentrant": False}, resolved.checkpointing == "offload"
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=again, offload=offload)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        if offload:
            emit(Fallback("checkpointing: inputs of layers stay on the GPU", "this transformers can't move them"))
    for layer in ours(base):  # computes again by itself; within a checkpoint it would do so twice
        layer.gradient_checkpointing = False
    if resolved.checkpointing != "selective":
        return
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        emit(Fallback("checkpointing: every layer is computed again", "its layers can't be told one by one"))
    for layer in layers[len(layers) - min(resolved.kept_layers, len(layers)) :]:
        layer.gradient_checkpointing = False
