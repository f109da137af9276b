"""The loss of distillation of single rows of logits, and its gradient, by hand.

    l = w · D(p, q) + (1 − w) · (logsumexp(z) − z_label)        z: the student's logits, w: the divergence's weight

p is the teacher's softmax and q the student's, both of logits over the temperature T and over the words that both
models have; the cross-entropy is over all of the student's, at temperature 1. With m = β·p + (1 − β)·q:

    forward-kl  D = Σ p·(log p − log q)                 T · ∂D/∂z = q − p
    reverse-kl  D = Σ q·(log q − log p)                 T · ∂D/∂z = q · (log q − log p − D)
    jsd         D = β·KL(p ‖ m) + (1 − β)·KL(q ‖ m)     T · ∂D/∂z = (1 − β) · q · (log q − log m − KL(q ‖ m))

Sources: Hinton et al. 2015, arXiv:1503.02531; Agarwal et al. 2024 (GKD), arXiv:2306.13649, equation 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...planner.distillation import Distillation


@dataclass(frozen=True)
class Rows:
    """What rows come to, ``[rows]`` each: their divergence, their cross-entropy, whether no logit is above the label's;
    and the gradient of the weighted sum of both by the student's logits, if it was asked for."""

    divergence: Tensor
    cross_entropy: Tensor
    right: Tensor
    gradient: Tensor | None


def distilled_rows(student: Tensor, teacher: Tensor, labels: Tensor, wanted: Distillation, *, gradient: bool) -> Rows:
    """Loss and gradient of rows.

    Args:
        student, teacher: logits ``[rows, words]`` in fp32 or fp64, of vocabularies that begin alike.
        labels: ``[rows]`` int64, each one of the student's words.
    """
    shared, heat = min(student.shape[-1], teacher.shape[-1]), wanted.temperature
    alike = heat == 1 and shared == student.shape[-1]
    told = student.log_softmax(-1)
    cross = -told.gather(-1, labels[:, None])[:, 0]
    right = cross <= -told.amax(-1)
    log_q = told if alike else (student[:, :shared] / heat).log_softmax(-1)
    log_p = (teacher[:, :shared] if heat == 1 else teacher[:, :shared] / heat).log_softmax(-1)
    q, made = log_q.exp(), None
    if gradient and wanted.weight < 1:
        made = (q if alike else told.exp_()) * (1 - wanted.weight)
        at = labels[:, None]
        made.scatter_add_(-1, at, torch.full_like(at, wanted.weight - 1, dtype=made.dtype))
    divergence, slope = _diverged(log_p, log_q, q, wanted, gradient=gradient)
    if slope is None:
        return Rows(divergence, cross, right, None)
    factor = wanted.weight / heat
    if made is None:
        made = slope if shared == student.shape[-1] else nn.functional.pad(slope, (0, student.shape[-1] - shared))
        return Rows(divergence, cross, right, made.mul_(factor))
    made[:, :shared].add_(slope, alpha=factor)
    return Rows(divergence, cross, right, made)


def _diverged(
    log_p: Tensor, log_q: Tensor, q: Tensor, wanted: Distillation, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence of each row, and T times its gradient by the student's logits; ``log_p`` and ``q`` are spoilt."""
    if wanted.divergence == "forward-kl":
        p = log_p.exp()
        divergence = log_p.sub_(log_q).mul_(p).sum(-1)
        return divergence, q.sub_(p) if gradient else None
    if wanted.divergence == "reverse-kl":
        ratio = torch.sub(log_q, log_p, out=log_p)
        divergence = (q * ratio).sum(-1)
        return divergence, ratio.sub_(divergence[:, None]).mul_(q) if gradient else None
    share = wanted.share
    log_m = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    from_teacher = (log_p - log_m).mul_(log_p.exp_()).sum(-1)
    ratio = torch.sub(log_q, log_m, out=log_m)
    from_student = (q * ratio).sum(-1)
    divergence = share * from_teacher + (1 - share) * from_student
    return divergence, ratio.sub_(from_student[:, None]).mul_(q).mul_(1 - share) if gradient else None
