"""AdamW on a GPU: one launch for all that is trained, which clips gradients while it reads them.

Adapters are hundreds of small fp32 tensors, and an optimiser that launches a kernel for each (bitsandbytes' 8-bit
AdamW does) keeps the GPU waiting for Python: 29 ms of a 480 ms step of an 8B on an H200, for 2.6 ms of work.

A bf16 weight has steps of 1/256 of its size. At the learning rates of full fine-tuning (1e-5) an update is a small
part of such a step, and rounding to nearest loses it; rounded at random, updates add up to what they should.

A gradient that is no number is left out by the kernel itself, so nobody waits for its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..events import Fallback

#: How states of 16-bit and of fp32 weights are stored, by the trainer's own name of the optimiser that this one stands
#: in for.
_STATES = {"adamw_torch_fused": ("bf16", "fp32"), "adamw_bnb_8bit": ("8bit", "8bit")}


def fused_adamw(
    model: Any, args: Any, emit: Callable[[Any], object], shards: list[torch.nn.Parameter] | None = None, *,
    kernels: bool = True,
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:  # fmt: skip
    """The class and its arguments, in the form that a trainer takes; None if the trainer's own optimiser serves.

    Args:
        args: the trainer's settings.
        emit: is told where the trainer's own has to serve though this one was due.
        shards: what the optimiser is given in place of the parameters of a model that is split over ranks.
        kernels: whether fp32 weights have it too. In fp16 they never do: its scaler wants to look at gradients before.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    trained = [p for p in model.parameters() if p.requires_grad] if shards is None else shards
    formats = {p.dtype for p in trained}
    wide = formats == {torch.float32} and kernels and not args.fp16
    if optim not in _STATES or not (wide or formats == {torch.bfloat16}) or any(not p.is_cuda for p in trained):
        return None
    if why := _unusable(trained):
        emit(Fallback(f"optimizer: {'tensor by tensor' if wide else 'without stochastic rounding'}", why))
        return None
    from ...kernels.adamw import AdamW

    # Rows of an embedding get gradients of very different sizes, and share scales (arXiv 2110.02861, section 2.3).
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return AdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "states": _STATES[optim][wide],
        "wide": tables,
        "seed": args.seed,
    }


def clipped_on_the_way(
    optimizer: Any, parameters: Iterable[torch.nn.Parameter], max_norm: float
) -> torch.Tensor | None:
    """The norm of all gradients, and that they are clipped left to the step that reads them anyway.

    Returns:
        The norm before clipping; None if the optimiser is another one, and nothing was done.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not hasattr(inner, "scale_gradients") or not gradients:
        return None
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
    # As torch.nn.utils.clip_grad_norm_ has it; a norm that is no number is no step.
    inner.scale_gradients(torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), torch.nan))
    return norm


def _unusable(trained: list[torch.nn.Parameter]) -> str:
    if any(not p.is_contiguous() or not isinstance(p, torch.nn.Parameter) or hasattr(p, "placements") for p in trained):
        return "the weights are sharded or not contiguous"
    try:
        from ...kernels import adamw
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return f"Triton can't be imported ({error})"
    return adamw.prove(trained[0].device).why
