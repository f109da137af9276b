"""Steps that would spoil the weights: found before the update, left out, named by the rows that they are of, counted.

A loss or gradient that is not finite, or a loss far above those of the latest steps, is known before the optimiser
steps. Such an update is dropped, so one bad batch costs one step; after ``limits.nan_steps`` of them in a row the run
fails, with the weights and checkpoints of the last good step. Of a step that is told late (:mod:`.unread`) the device
decides, by the losses that are known by then. Either way a step is judged when it is told of.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...planner.errors import TrainingError
from ...planner.recipe import PACKABLE_METHODS, Recipe
from ..evaluate import reduce_sum
from ..events import Warn
from ..models.load import Emit
from .base import RunTrainer

#: Nats per token above the median of the latest steps that no batch of text reaches by chance: a model that knows
#: nothing is at ln(vocabulary), 10 to 12.5, a trained one at 1 to 3.
EXPLOSION = 5.0
#: Good steps that a loss is held against, and the fewest of them.
_LATEST, _FEWEST = 32, 8
#: Rows that are named, and letters of each.
_NAMED, _LETTERS = 8, 48


def explosion_of(recipe: Recipe) -> float | None:
    """The rise of the loss that counts as an explosion, or None where none does."""
    if recipe.limits.explosion != "auto":
        return recipe.limits.explosion
    return EXPLOSION if recipe.method in PACKABLE_METHODS else None


Verdict = Literal["good", "scaling", "not finite", "exploded"]
"""Of a step. ``scaling``: the gradient is too large for fp16, by which its loss scaler finds its scale."""


@dataclass(frozen=True)
class _Pending:
    """A step that is not told of yet: what its loss is held against, and what is known of it before it is told.

    Args:
        losses: shares of the loss by micro-batch of this rank.
    """

    usual: float | None
    losses: Sequence[float] = ()
    exploded: bool = False


class Divergence(TrainerCallback):
    """Judges every step, from one rank's micro-batches and the figures of all.

    Args:
        explosion: nats above the median of the latest steps; None: only what is not finite counts.
        nan_steps: bad steps in a row after which the run fails.
    """

    def __init__(self, trainer: RunTrainer, emit: Emit, *, explosion: float | None, nan_steps: int) -> None:
        self.trainer, self.emit, self.explosion, self.nan_steps = trainer, emit, explosion, nan_steps
        self._losses: list[torch.Tensor] = []
        """Of this step's micro-batches: shares of the step's mean, on the device."""
        self._good: deque[float] = deque(maxlen=_LATEST)
        self._bad: list[str] = []
        """What was wrong with each of the latest steps, since the last good one."""
        self._pending: dict[int, _Pending] = {}
        # Whatever carries a micro-batch out, eagerly or as a graph, is called by this name.
        inner = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = inner(*args, **kwargs)
            self._losses.append(loss.detach().clone())  # a graph writes the next one into the same memory
            return loss

        trainer.training_step = training_step  # type: ignore[method-assign]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave out an update whose loss explodes, or one not finite, which would make every weight nan for good."""
        step, usual = state.global_step + 1, statistics.median(self._good) if len(self._good) >= _FEWEST else None
        limit = math.inf if self.explosion is None or usual is None else usual + self.explosion
        losses, self._losses = self._losses, []
        if self.trainer.late:
            together = torch.stack(losses)
            above = together.sum() > limit
            self.trainer.leave_out_if(above)
            self.trainer.besides |= {"losses": together, "exploded": above}
            self._pending[step] = _Pending(usual)
            return
        here: list[float] = torch.stack(losses).tolist() if losses else []
        loss = sum(here)
        if torch.distributed.is_initialized() and self.explosion is not None:
            # Every rank must come to the same judgement; all have the same gradient.
            loss = reduce_sum(torch.tensor(loss), args.device).item() / args.world_size
        exploded = loss > limit
        if exploded or not math.isfinite(float(self.trainer.grad_norm)):
            for _name, parameter in self.trainer.trained_parameters():
                parameter.grad = None
        self._pending[step] = _Pending(usual, here, exploded)

    def judge(self, step: int, loss: float, grad_norm: float, figures: dict[str, list[float]] | None = None) -> Verdict:
        """What to think of a step, which is told once, and in order; the rows of a bad one are named.

        Args:
            loss: mean over all ranks, as ``grad_norm`` is of all, so that all come to the same judgement.
            figures: of a step that is told late.

        Raises:
            TrainingError: too many in a row went wrong (cause ``nan``).
        """
        pending = self._pending.pop(step)
        if figures is not None:
            pending = _Pending(pending.usual, figures["losses"], bool(figures["exploded"][0]))
        if not math.isfinite(loss):
            self._bad.append("loss was not finite")
            if not math.isfinite(sum(pending.losses)):  # else it is another rank's
                self._name(step, "the loss of step {} is not finite", pending.losses)
            verdict: Verdict = "not finite"
        elif not math.isfinite(grad_norm) and self.trainer.args.fp16:
            return "scaling"
        elif not math.isfinite(grad_norm):
            self._bad.append("gradient norm was not finite")
            self._name(step, "the gradient of step {} is not finite", pending.losses)
            verdict = "not finite"
        elif pending.exploded:
            self._bad.append("loss exploded")
            self._name(step, f"the loss of step {{}} rose from {pending.usual:.2f} to {loss:.2f}", pending.losses)
            verdict = "exploded"
        else:
            self._good.append(loss)
            self._bad.clear()
            return "good"
        if len(self._bad) >= self.nan_steps:
            raise TrainingError(
                f"the {' or '.join(dict.fromkeys(self._bad))} for {len(self._bad)} steps in a row, up to step {step}",
                cause="nan",
                do="Lower optimizer.learning_rate, set max_grad_norm to 1.0, or use precision bf16-mixed; look at the "
                "rows that the warnings name; limits.explosion says how far the loss may rise. The last good "
                "checkpoint is kept.",
            )
        return verdict

    def _name(self, step: int, what: str, losses: Sequence[float]) -> None:
        batches = rows_of_step(self.trainer, step)
        guilty = [rows for rows, loss in zip(batches, losses, strict=False) if not math.isfinite(loss)]
        rows = [row for batch in guilty or batches for row in batch]
        self.emit(
            Warn(
                f"{what.format(step)}: its update is left out",
                where=f"rows {describe(self.trainer, rows)}",
                do="Look at these rows with 'finetui data', or lower optimizer.learning_rate.",
            )
        )


def rows_of_step(trainer: RunTrainer, step: int) -> list[list[int]]:
    """The numbers of the rows that this rank trained on in a step (counted from 1), micro-batch by micro-batch."""
    each = trainer.order.accumulation
    return list(itertools.islice(trainer.order, (step - 1) * each, step * each))


def describe(trainer: RunTrainer, rows: Iterable[int]) -> str:
    """Rows as ``number sha256 'how it begins'``: numbers move when data is added, the hash of the tokens does not."""
    data: Any = trainer.train_dataset
    tokenizer: Any = trainer.processing_class
    told = []
    unique = list(dict.fromkeys(rows))
    for row in unique[:_NAMED]:
        columns = {name: values for name, values in data[row].items() if name.endswith("_ids")}
        tokens = [int(token) for values in columns.values() for token in values]
        content = " ".join(map(str, tokens)) if tokens else repr(sorted(data[row].items()))  # prompts are text
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        begins = tokenizer.decode(tokens[: _LETTERS // 2])[:_LETTERS] if tokens else ""
        told.append(f"{row} {digest} {begins!r}")
    more = f" and {len(unique) - _NAMED} more" if len(unique) > _NAMED else ""
    return "; ".join(told) + more
