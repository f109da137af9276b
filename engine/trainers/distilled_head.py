"""Both heads and the loss of distillation in one, over labelled rows alone, a few rows at a time.

Of neither model the logits of a batch are ever in memory: for one chunk of rows both heads' products are made, the loss
and its gradient by the student's logits (:mod:`.distilled_rows`), and from that the gradient of the student's hidden
states, and of its head if it is trained. So forward does all products, and backward only scales, as
``kernels/linear_cross_entropy.py`` does. A student's head that is more than one matrix (an adapter or a bias on it), or
fp16, whose gradients have to be made after the loss is scaled up, computes its chunks once more in backward instead.

A model is given a second way to be called, so that wrappers around it (adapters, autocast, data parallelism) act as
ever.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ...kernels.wide import add_mm_fp32, mm_fp32
from ...planner.distillation import Distillation
from ...planner.teacher import CHUNK_ROWS
from ..evaluate import IGNORED
from .distilled_rows import Rows, distilled_rows
from .head import _disagreement, _logit_shape


@dataclass
class DistilledLoss(ModelOutput):
    """``loss``: the weighted sum over labelled rows divided by ``items``; ``divergence`` and ``cross_entropy``: their
    sums by themselves; ``right``: how many labels have the largest logit."""

    loss: Tensor | None = None
    divergence: Tensor | None = None
    cross_entropy: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """An output head, and what the architecture does to what it gives: a factor, and a soft cap after it."""

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, causal: Any) -> Head:
        """Of a causal model."""
        return cls(causal.get_output_embeddings(), *_logit_shape(causal.config.get_text_config()))

    @property
    def plain(self) -> bool:
        """Whether it is one matrix, and nothing listens to it."""
        m: Any = self.module
        listened = m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
        return type(m) is nn.Linear and m.bias is None and not listened

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits ``[rows, words]`` in fp32 (fp64 stays), and tanh of what the cap cut, if there is one.

        Args:
            weight: of a plain head, in the format of ``hidden``, where nobody asks for gradients by autograd: sums are
                fp32 then, and not rounded before.
        """
        raw = _wide(self.module(hidden)) if weight is None else mm_fp32(hidden, weight.t())
        if self.scale != 1:
            raw = raw * self.scale
        if self.cap is None:
            return raw, None
        bent = torch.tanh(raw / self.cap)
        return bent * self.cap, bent

    def by_products(self, gradient: Tensor, bent: Tensor | None) -> Tensor:
        """The gradient by what the matrix gave from that by the logits, in place."""
        if bent is not None:
            gradient.mul_(1 - bent.square())
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class Lesson:
    """What a call asks for.

    Args:
        states: the teacher's last hidden states of the labelled rows, in order.
        rows: which rows of the flattened batch these are, int64.
        labels: the words there.
        items: what the summed loss is divided by, on the device.
        head: the teacher's.
        fused: gradients may be made in forward.
    """

    states: Tensor
    rows: Tensor
    labels: Tensor
    items: Tensor
    head: Head
    wanted: Distillation
    fused: bool = True

    @torch.no_grad()
    def theirs(self, among: slice) -> Tensor:
        """The teacher's logits of some of the rows."""
        states, plain = self.states[among], self.head.plain
        weight: Any = self.head.module.weight if plain else None
        with torch.autocast(states.device.type, enabled=False):
            return self.head.logits(states, weight)[0]


def labelled(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which rows of a flattened batch have a label, and the labels; nobody waits for the device.

    Args:
        labels: ``[batch, length]``, aligned with ``input_ids``; position t learns the label after it.
        count: how many labels there are behind first positions.
    """
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    rows = shifted.ne(IGNORED).to(torch.int8).argsort(descending=True, stable=True)[:count]
    return rows, shifted.index_select(0, rows)


def give_lessons(model: Any, context: contextlib.AbstractContextManager[Any]) -> str:
    """Let ``model(…, lesson=Lesson(…))`` answer with a :class:`DistilledLoss`; or say why it can't.

    All other calls go where they went before.

    Args:
        context: in which the model computes, for a trial.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if why := unfit(causal, context):
        return why
    head, stock = Head.of(causal), causal.forward

    def forward(*args: Any, lesson: Lesson | None = None, **kwargs: Any) -> Any:
        if lesson is None:
            return stock(*args, **kwargs)
        out = causal.base_model(*args, **(kwargs | {"use_cache": False}))
        hidden = out.last_hidden_state
        # Of a learned prompt there are no rows here: those are refused.
        return distilled(hidden.reshape(-1, hidden.shape[-1]).index_select(0, lesson.rows), head, lesson)

    causal.forward = forward
    return ""


def unfit(causal: Any, context: contextlib.AbstractContextManager[Any]) -> str:
    """Why logits of a model can't be made of its last hidden states; empty if they can."""
    if not hasattr(causal, "base_model") or causal.base_model is causal or causal.get_output_embeddings() is None:
        return "it has no backbone and output head of its own"
    head = Head.of(causal)
    with context:
        return _disagreement(causal, head.scale, head.cap)


def distilled(hidden: Tensor, head: Head, lesson: Lesson, *, chunk_rows: int = CHUNK_ROWS) -> DistilledLoss:
    """The loss of a student's hidden states ``[rows, features]`` against its teacher's."""
    device, gradient = hidden.device.type, torch.is_grad_enabled()
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if lesson.fused and head.plain:
        with torch.autocast(device, enabled=False):
            loss, *sums = _Fused.apply(hidden, head.module.weight, head, lesson, chunk_rows, gradient)
        return DistilledLoss(loss, *sums)
    total, sums = hidden.sum() * 0.0, []
    for start in range(0, hidden.shape[0], chunk_rows):
        among = slice(start, start + chunk_rows)
        part, *mine = checkpoint(_chunk, hidden[among], head, lesson, among, gradient, use_reentrant=False)
        total = total + part
        sums.append(torch.stack(mine))
    told = torch.stack(sums).sum(0).detach() if sums else torch.zeros(3, dtype=torch.float64, device=hidden.device)
    return DistilledLoss(total, *told)


def _chunk(hidden: Tensor, head: Head, lesson: Lesson, among: slice, gradient: bool) -> tuple[Tensor, ...]:
    logits, _ = head.logits(hidden)
    return _OfLogits.apply(logits, lesson.theirs(among), lesson, among, gradient)


class _OfLogits(torch.autograd.Function):
    """The loss of one chunk from its logits."""

    @staticmethod
    def forward(
        ctx: Any, mine: Tensor, theirs: Tensor, lesson: Lesson, among: slice, gradient: bool
    ) -> tuple[Tensor, ...]:
        found = distilled_rows(mine, theirs, lesson.labels[among], lesson.wanted, gradient=gradient)
        if found.gradient is not None:
            ctx.save_for_backward(found.gradient.div_(lesson.items))
        loss, *sums = _summed([found], lesson)
        ctx.mark_non_differentiable(*sums)
        return loss, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss, None, None, None, None


class _Fused(torch.autograd.Function):
    """The loss of all rows, with its gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, head: Head, lesson: Lesson, chunk_rows: int, gradient: bool
    ) -> tuple[Tensor, ...]:
        h_grad, w_grad = (gradient and needed for needed in ctx.needs_input_grad[:2])
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        w = weight.to(hidden.dtype)
        dh = torch.zeros_like(hidden) if h_grad else None
        dw = torch.zeros(weight.shape, dtype=wide, device=weight.device) if w_grad else None
        found = []
        for start in range(0, hidden.shape[0], chunk_rows):
            among = slice(start, start + chunk_rows)
            part = hidden[among]
            mine, bent = head.logits(part, w)
            theirs = lesson.theirs(among)
            rows = distilled_rows(mine, theirs, lesson.labels[among], lesson.wanted, gradient=h_grad or w_grad)
            if rows.gradient is not None:
                # As narrow as the head: the products' sums are fp32.
                dz = head.by_products(rows.gradient, bent).to(hidden.dtype)
                if dh is not None:
                    dh[among] = mm_fp32(dz, w).div_(lesson.items).to(dh.dtype)
                if dw is not None and wide == torch.float64:
                    dw.addmm_(dz.t(), part)
                elif dw is not None:
                    add_mm_fp32(dw, dz.t(), part)
            found.append(Rows(rows.divergence, rows.cross_entropy, rows.right, None))
            del mine, bent, theirs, rows
        ctx.gradients = dh, None if dw is None else dw.div_(lesson.items).to(weight.dtype)
        loss, *sums = _summed(found, lesson)
        ctx.mark_non_differentiable(*sums)
        return loss, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss was asked for its gradient twice; what it kept is handed on")
        (dh, dw), ctx.gradients = ctx.gradients, None
        for made in (dh, dw):
            if made is not None:
                made.mul_(dloss)
        return dh, dw, None, None, None, None


def _summed(found: list[Rows], lesson: Lesson) -> tuple[Tensor, ...]:
    """The loss, and the sums of divergence, cross-entropy and hits, in fp64."""
    if not found:
        none = torch.zeros((), dtype=torch.float64, device=lesson.items.device)
        return none.to(lesson.items.dtype), none, none.clone(), none.clone()
    columns = ([rows.divergence for rows in found], [r.cross_entropy for r in found], [r.right for r in found])
    divergence, cross, right = (torch.cat(column).sum(dtype=torch.float64) for column in columns)
    weight = lesson.wanted.weight
    return (
        ((weight * divergence + (1 - weight) * cross) / lesson.items).to(lesson.items.dtype),
        divergence,
        cross,
        right,
    )


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
