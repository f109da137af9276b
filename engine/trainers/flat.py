"""An optimiser that updates hundreds of small tensors as one.

LoRA on an 8B model trains 448 tensors, and an optimiser that launches one kernel for each (8-bit AdamW does) keeps the
GPU waiting for Python: 29 ms of a 480 ms step on an H200, for 2.6 ms of work. Here the tensors become parts of one
long tensor, in place, and the optimiser sees that one. Its arithmetic is element by element, or by blocks of 256 that
no tensor taken in shares with another, so the result is the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch

#: 8-bit optimiser states share a scale among so many neighbours (bitsandbytes, ``optimizer_update_8bit_blockwise``).
BLOCK = 256
#: Below this bitsandbytes keeps its states in 32 bits, so these tensors stay by themselves.
SMALLEST = 4096
#: Where an optimiser keeps what :func:`flatten` joined: one long tensor's id to its members.
_JOINED = "_finetui_joined"


def flatten(optimizer: torch.optim.Optimizer) -> int:
    """Make one tensor of each group's fp32 tensors, before the first step; returns how many were taken in.

    The parameters stay those of the model: their memory moves, and their gradients are gathered at each step. A step
    before which no gradient is there passes them over, as it would have.
    """
    assert not optimizer.state, "the optimiser has taken a step already"
    joined: list[tuple[torch.nn.Parameter, list[torch.nn.Parameter]]] = []
    for group in optimizer.param_groups:
        members = [p for p in group["params"] if _fits(p)]
        if len(members) < 2:
            continue
        whole = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in members]))
        for p, part in zip(members, whole.detach().split([p.numel() for p in members]), strict=True):
            p.data = part.view(p.shape)
        taken = {id(p) for p in members}
        group["params"] = [whole, *(p for p in group["params"] if id(p) not in taken)]
        joined.append((whole, members))

    def gather(*_: Any) -> None:
        for whole, members in joined:
            if (together := _end_to_end([p.grad for p in members])) is not None:
                whole.grad = together
            elif any(p.grad is not None for p in members):
                parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
                whole.grad = torch.cat([part.reshape(-1) for part in parts])

    def release(*_: Any) -> None:
        for whole, _members in joined:
            whole.grad = None

    if joined:
        vars(optimizer)[_JOINED] = {id(whole): members for whole, members in joined}
        optimizer.register_step_pre_hook(gather)
        optimizer.register_step_post_hook(release)
    return sum(len(members) for _, members in joined)


def members_of(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> list[torch.nn.Parameter]:
    """The parameters of the model that one of an optimiser's stands for, end to end."""
    members: list[torch.nn.Parameter] = vars(optimizer).get(_JOINED, {}).get(id(parameter), [parameter])
    return members


def _end_to_end(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Tensors that follow one another in one memory, as those of :mod:`..graphs` do, as one; None if they do not."""
    first, size = parts[0], 0
    if first is None:
        return None
    memory, start = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        if part is None or not part.is_contiguous() or part.dtype != first.dtype:
            return None
        if part.untyped_storage().data_ptr() != memory or part.storage_offset() != start + size:
            return None
        size += part.numel()
    return first.as_strided((size,), (1,), start)


def shorten_walks(model: Any, trained: list[torch.nn.Parameter]) -> None:
    """Two things that a trainer asks of a model in every step, without a walk over all its modules.

    Between the last kernel of one step and the first of the next the GPU waits for such walks: some thousand modules,
    to clear gradients that only ``trained`` can have and to set a mode that is set already. That it is set is known of
    a walk made here alone: what the model says of itself need not hold inside it. PEFT's wrapper begins in training
    mode around a base in evaluation mode, as transformers loads it, whose layers would neither drop out nor recompute.
    """
    stock_train, walked = model.train, False

    def zero_grad(set_to_none: bool = True) -> None:
        for p in trained:
            if set_to_none or p.grad is None:
                p.grad = None
            else:
                p.grad.detach_().zero_()

    def train(mode: bool = True) -> Any:
        nonlocal walked
        if not (walked and mode and model.training):
            stock_train(mode)
            walked = True
        return model

    model.zero_grad, model.train = zero_grad, train


def _fits(p: torch.nn.Parameter) -> bool:
    plain = p.dtype == torch.float32 and p.is_contiguous() and type(p) is torch.nn.Parameter
    return plain and p.numel() >= SMALLEST and p.numel() % BLOCK == 0
