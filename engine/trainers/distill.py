"""Distillation: a student learns from the probabilities of a frozen teacher, beside the labels.

The loss of an optimiser step is the sum over all trained tokens of the global batch divided by their number, as in
supervised fine-tuning, of ``weight`` times the divergence and the rest times the cross-entropy
(:mod:`.distilled_rows`). The teacher reads each micro-batch before the student does; what is kept of that are its last
hidden states where there is a label.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ...planner.distillation import Distillation
from ...planner.errors import ModelError
from ...planner.teacher import find_teacher
from ..data.packing import Collator
from ..evaluate import reduce_sum
from ..events import Fallback, Phase
from ..models.load import Emit
from ..models.teacher import load_teacher
from .distilled_head import DistilledLoss, Head, Lesson, give_lessons, labelled, unfit
from .job import Job
from .sft import TokenMeanTrainer, finished_rows
from .unasked import no_masks, told

#: Sums of nats are counted in whole parts of this many to one, so that they add up alike in any order.
_PARTS = 2**20
#: Stands for what is no number among them: larger than any sum of a step.
_NO_NUMBER = 2**52


class Teacher:
    """A frozen causal model, asked for what its head takes.

    Args:
        causal: loaded, without gradients.
    """

    def __init__(self, causal: Any) -> None:
        self.causal, self.head = causal, Head.of(causal)

    @torch.no_grad()
    def states(self, inputs: dict[str, Any], rows: Tensor) -> Tensor:
        """Last hidden states ``[rows, features]`` of some positions of a flattened batch."""
        with torch.autocast(rows.device.type, enabled=False):
            last: Tensor = self.causal.base_model(**inputs, use_cache=False).last_hidden_state
        return last.reshape(-1, last.shape[-1]).index_select(0, rows)


class DistillTrainer(TokenMeanTrainer):
    """``SFTTrainer`` with the loss of a student, and the data order, evaluation and checkpoints of a run.

    Args:
        teacher: on the same device.
        wanted: what is learned from it.
        rest: what :class:`.sft.TokenMeanTrainer` takes.
    """

    def __init__(self, *, teacher: Teacher, wanted: Distillation, **rest: Any) -> None:
        self.teacher, self.wanted = teacher, wanted
        super().__init__(**rest)
        self.fuses_loss = True

    def learn(self, emit: Emit) -> None:
        """Give the student its second way to be called.

        Raises:
            ModelError: an architecture makes its logits in a way of its own.
        """
        context = self.numerics.context(self.args.device)
        plain = contextlib.nullcontext()
        for who, why in (
            ("teacher", unfit(self.teacher.causal, plain)),
            ("student", give_lessons(self.model, context)),
        ):
            if why:
                do = "Use another model, or train by sft on answers that the teacher wrote."
                raise ModelError(f"distillation can't use the {who}'s output head: {why}", where=who, do=do)
        if self.aux_loss_enabled:
            emit(Fallback("the loss that balances experts is left out", "distillation takes hidden states alone"))

    def _fused_loss(self, model: Any, inputs: dict[str, Any], num_items: Tensor, tokens: int, labels: int) -> Tensor:
        # As in supervised training: rows are padded on the right, where no labelled position of a causal model looks.
        inputs.pop("attention_mask", None)
        out = self.token_loss(model, inputs, num_items, labels)
        assert out.loss is not None
        right, divergence, cross = _counted(out)
        sizes = [torch.full_like(right, tokens), torch.full_like(right, labels)]  # a copy would wait for the device
        self.count(torch.stack([*sizes, right, divergence, cross]))
        return out.loss

    def token_loss(self, model: Any, inputs: dict[str, Any], num_items: Tensor, labelled: int) -> DistilledLoss:
        """Loss and figures of a micro-batch; arguments as of :meth:`.sft.TokenMeanTrainer.token_loss`."""
        documents = inputs.pop("documents", None)
        share = num_items.clamp(min=1).float() / self.accelerator.num_processes
        lesson = self._lesson(inputs, share, labelled)
        spared = False
        if self.whole_layers:
            config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
            known = inputs if documents is None else {**inputs, "documents": documents}
            inputs, spared = told(known, config)
        with no_masks() if spared else contextlib.nullcontext():
            out: DistilledLoss = model(**inputs, use_cache=False, lesson=lesson)
        return out

    def _lesson(self, inputs: dict[str, Any], items: Tensor, count: int) -> Lesson:
        """What the teacher has to say about a batch, whose labels are taken out."""
        rows, labels = labelled(inputs.pop("labels"), count)
        fused = self.numerics.autocast is not torch.float16
        return Lesson(self.teacher.states(inputs, rows), rows, labels, items, self.teacher.head, self.wanted, fused)

    def figures(self, counts: list[int]) -> dict[str, float]:
        """Divergence and cross-entropy per trained token, and the share of them that the student would have chosen."""
        _tokens, trained, right, divergence, cross = counts
        each = max(trained, 1)
        return {
            "divergence": _nats(divergence) / each,
            "cross_entropy": _nats(cross) / each,
            "token_accuracy": round(right / each, 5),
        }

    def measure(self) -> dict[str, float]:
        """The same over the held-out rows now, and the loss that they make together."""
        sums, trained = torch.zeros(3, dtype=torch.float64), 0
        model: Any = self.model
        size, world = self.args.per_device_eval_batch_size, self.args.world_size
        one, training = torch.ones((), device=self.args.device), model.training
        model.eval()
        try:
            with torch.no_grad(), self.numerics.context(self.args.device):
                for place in range(self.args.process_index * size, len(self.held_out), size * world):
                    chosen = range(place, min(place + size, len(self.held_out)))
                    batch = self._collate_counted([self.held_out[i] for i in chosen])
                    count = batch.pop("num_labelled")
                    kept = {name: part.to(self.args.device) for name, part in batch.items() if torch.is_tensor(part)}
                    lesson = self._lesson(kept, one, count)
                    out = model(**kept, use_cache=False, lesson=lesson)
                    sums += torch.stack([out.divergence, out.cross_entropy, out.right]).cpu()
                    trained += count
        finally:
            model.train(training)
        together = torch.cat([sums, torch.tensor([float(trained)], dtype=torch.float64)])
        divergence, cross, right, tokens = reduce_sum(together, self.args.device).tolist()
        if not tokens:
            return {"loss": float("nan"), "divergence": float("nan"), "cross_entropy": float("nan"), "accuracy": 0.0}
        loss = (self.wanted.weight * divergence + (1 - self.wanted.weight) * cross) / tokens
        return {
            "loss": loss,
            "divergence": divergence / tokens,
            "cross_entropy": cross / tokens,
            "accuracy": right / tokens,
        }


def _counted(out: DistilledLoss) -> tuple[Tensor, ...]:
    """Hits, and the sums of both losses in whole parts, as int64."""
    assert out.right is not None
    sums = torch.stack([out.divergence, out.cross_entropy]).mul(_PARTS).round()  # type: ignore[list-item]
    limit = float(_NO_NUMBER)
    parts = sums.nan_to_num(nan=limit, posinf=limit, neginf=limit).clamp(max=limit).to(torch.int64)
    return out.right.to(torch.int64), parts[0], parts[1]


def _nats(parts: int) -> float:
    return parts / _PARTS if parts < _NO_NUMBER else float("nan")


def distill_trainer(job: Job) -> DistillTrainer:
    """The trainer of distill.

    Raises:
        ModelError: the teacher can't be read, or one of the two models can't be used so.
    """
    assert job.teacher is not None
    wanted = job.recipe.distillation
    job.emit(Phase("loading the teacher", wanted.teacher))
    causal = load_teacher(
        find_teacher(wanted.teacher), job.teacher, job.recipe, job.resolved, job.device, job.emit
    )  # fmt: skip
    collate = Collator(job.tokenizer.pad_token_id, multiple_of=job.multiple_of)
    trainer = DistillTrainer(
        teacher=Teacher(causal), wanted=wanted, collate=collate, args=finished_rows(job), **job.common()
    )
    trainer.whole_layers = job.whole_layers
    trainer.learn(job.emit)
    return trainer
