"""Held-out loss: the mean over trained tokens, exact however rows are batched, packed or spread over ranks.

For a token t with label y and logits z, the loss is -log softmax(z)_y in fp32; the mean is the sum over all tokens
with a label divided by their number, not a mean of the means of batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.token_weights import Weighting, token_weights
from ..planner.plan import Resolved
from .data.prepared import DataSettings

if TYPE_CHECKING:
    from .run import Run

IGNORED = -100
Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Scored:
    """What one batch adds up to: ``loss`` summed over ``trained`` tokens (0-d tensors), of which the model would have
    chosen ``right`` ones itself; ``auxiliary`` is the load-balancing loss of a mixture of experts."""

    loss: Tensor
    trained: Tensor
    right: Tensor
    auxiliary: Tensor | None = None


def score(
    model: Any, batch: dict[str, Tensor], *, fused: bool, routed: bool = False, weighting: Weighting = "nll"
) -> Scored:
    """The summed loss of a batch with ``labels`` (``[batch, length]``, aligned with ``input_ids``).

    Args:
        fused: the model has TRL's fused output head, which never holds all logits at once. It needs Triton, so on the
            CPU the logits are made, and those of labelled positions are upcast.
        routed: ask a mixture of experts for its auxiliary loss.
        weighting: how much each token counts; eaft needs all logits, which a fused head never has.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    extra = {"output_router_logits": True} if routed else {}
    if fused:
        out = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True, **extra)
        losses = -out.log_probs  # 0 where there is no label
        if weighting != "nll":
            assert weighting == "dft", weighting
            losses = losses * out.log_probs.detach().exp()
        return Scored(losses.sum(), out.label_mask.sum(), out.is_top1.sum(), out.aux_loss)
    out = model(**inputs, use_cache=False, **extra)
    targets = labels[:, 1:]
    counted = targets != IGNORED
    # A batch without any label still depends on every weight, so that ranks agree on what to reduce.
    positions = out.logits[:, -labels.shape[1] :]  # of a learned prompt, those before the words don't count
    logits = positions[:, :-1][counted].float()
    wanted = targets[counted]
    if weighting == "nll":
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    else:
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        loss = (token_weights(weighting, logits, losses) * losses).sum()
    right = (logits.argmax(-1) == wanted).sum()
    return Scored(loss, counted.sum(), right, getattr(out, "aux_loss", None) if routed else None)


@dataclass(frozen=True)
class HeldOut:
    """Mean loss per trained token, the share of tokens the model would have chosen itself, and how many tokens."""

    loss: float
    accuracy: float
    tokens: int


def held_out_loss(
    model: Any,
    rows: Any,
    collate: Collate,
    *,
    batch_size: int,
    device: torch.device,
    fused: bool = False,
    rank: int = 0,
    world: int = 1,
    context: contextlib.AbstractContextManager[Any] | None = None,
    together: bool = False,
) -> HeldOut:
    """Score all ``rows`` without gradients; every rank takes each ``world``-th batch and all get the same answer.

    Args:
        together: each rank has a part of the model, so all call it equally often: one that has no batch left
            computes its first rows once more, and does not count them.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), context or contextlib.nullcontext():
            end = -(-len(rows) // (batch_size * world)) * batch_size * world if together else len(rows)
            for place in range(rank * batch_size, end, batch_size * world):
                start = place if place < len(rows) else 0
                chosen = range(start, min(start + batch_size, len(rows)))
                batch = {name: t.to(device) for name, t in collate([rows[i] for i in chosen]).items()}
                scored = score(model, batch, fused=fused)
                if place >= len(rows):
                    continue
                sums += torch.stack([scored.loss.double(), scored.trained.double(), scored.right.double()]).cpu()
    finally:
        model.train(training)
    loss, tokens, right = reduce_sum(sums, device).tolist()
    return HeldOut(loss / tokens if tokens else float("nan"), right / max(tokens, 1), int(tokens))


def reduce_sum(values: Tensor, device: torch.device) -> Tensor:
    """Element-wise sum over all ranks, on ``device``."""
    moved = values.to(device)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        moved = moved.clone() if moved is values else moved
        torch.distributed.all_reduce(moved)
    return moved


def data_settings(resolved: Resolved) -> DataSettings:
    """The part of a plan that decides what the rows look like."""
    return DataSettings(
        sequence_length=resolved.sequence_length,
        packing=resolved.packing,
        train_on=resolved.train_on,
        seed=resolved.seed,
        method=resolved.method,
        rows=resolved.steps * resolved.batch_size,
    )


def data_cache(run: Run) -> Path:
    """Where a run's tokenised rows lie; inside the run, so that they are there for as long as it is."""
    return run.path / "data"
