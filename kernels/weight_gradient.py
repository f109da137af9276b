"""Gradients of trained weights and biases; those of weights added by the product itself to what is there already.

    dW = dyᵀ·x          db = Σ_rows dy

Autograd would make each dW in memory of its own and add it to ``.grad`` in a second pass, from the second micro-batch
of a step on. A product that adds to its output needs neither the memory nor the pass, and the sum is rounded once
instead of twice.

That bypasses autograd, so it is done only where adding is all that would have happened to the gradient: no hook
listens to the weight, no process group shares it (DDP's reducer is told through autograd), and the pass is a plain
``backward()``, not ``autograd.grad``. Everywhere else, and where no gradient is there yet, autograd is handed a new
one, which it keeps without a copy.
"""

from __future__ import annotations

import torch

from .wide import add_mm_fp32, mm_fp32


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """dW like ``weight``; None if it was added to ``weight.grad``.

    Args:
        dy: ``[rows, out]``; x: ``[rows, in]``.
        weight: in their dtype, or in fp32.
    """
    there, wider = _to_add_to(weight), weight.dtype != dy.dtype
    if there is None:
        return mm_fp32(dy.t(), x) if wider else torch.mm(dy.t(), x)
    if wider:
        add_mm_fp32(there, dy.t(), x)
    else:
        torch.addmm(there, dy.t(), x, out=there)
    return None


def bias_gradient(dy: torch.Tensor) -> torch.Tensor:
    """db, ``[out]``, in fp32."""
    return torch.sum(dy, dim=0, dtype=torch.float32)


def _to_add_to(weight: torch.Tensor) -> torch.Tensor | None:
    """The gradient that autograd would add to, and do nothing else."""
    if not weight.is_leaf:
        return None
    grad = weight.grad
    if grad is None or grad.dtype != weight.dtype or grad.layout != torch.strided or not grad.is_contiguous():
        return None
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    return grad if _accumulates(weight) else None


def _accumulates(weight: torch.Tensor) -> bool:
    """Whether the backward pass that is under way leaves its gradient in ``.grad``."""
    try:
        return bool(torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node))
    except RuntimeError:  # autograd.grad of this very weight
        return False
