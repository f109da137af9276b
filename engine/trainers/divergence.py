"""Steps that would spoil the weights: found before the update, left out, and named by the rows that they are of.

A loss or gradient that is not finite, or a loss far above those of the latest steps, is known before the optimiser
steps. Such an update is dropped, so one bad batch costs one step; after ``limits.nan_steps`` of them in a row the run
fails, with the weights and checkpoints of the last good step. Of a step that is told late (:mod:`.unread`) the device
decides, by the losses that are known by then, and the host learns of it with the step's other figures.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

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


class Divergence(TrainerCallback):
    """Watches one rank's micro-batches.

    Args:
        explosion: nats above the median of the latest steps; None: only what is not finite counts.
        nan_steps: exploding steps in a row after which the run fails.
    """

    def __init__(self, trainer: RunTrainer, emit: Emit, *, explosion: float | None, nan_steps: int) -> None:
        self.trainer, self.emit, self.explosion, self.nan_steps = trainer, emit, explosion, nan_steps
        self._losses: list[torch.Tensor] = []
        """Of this step's micro-batches: shares of the step's mean, on the device."""
        self._good: deque[float] = deque(maxlen=_LATEST)
        self._exploded = 0
        self._usual: dict[int, float | None] = {}
        """What the losses of steps were held against that are not told of yet."""
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
        """Leave an update out whose loss explodes."""
        step, usual = state.global_step + 1, statistics.median(self._good) if len(self._good) >= _FEWEST else None
        limit = math.inf if self.explosion is None or usual is None else usual + self.explosion
        losses, self._losses = self._losses, []
        if self.trainer.late:
            together = torch.stack(losses)
            above = together.sum() > limit
            self.trainer.leave_out_if(above)
            self.trainer.besides |= {"losses": together, "exploded": above}
            self._usual[step] = usual
            return
        here: list[float] = torch.stack(losses).tolist() if losses else []
        loss, broken = sum(here), not math.isfinite(float(self.trainer.grad_norm))
        if torch.distributed.is_initialized() and (self.explosion is not None or broken):
            # Every rank must come to the same judgement, and all have the same gradient.
            loss = reduce_sum(torch.tensor(loss), args.device).item() / args.world_size
        exploded = loss > limit
        if exploded and not broken:
            for _name, parameter in self.trainer.trained_parameters():
                parameter.grad = None
        self._judge(step, here, loss, usual, broken=broken, exploded=exploded, fp16=args.fp16)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """End the run once too many steps in a row have exploded."""
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        if "figures" in logs:
            step, figures = logs["step"], logs["figures"]
            losses, exploded = figures["losses"], bool(figures["exploded"][0])
            broken = not math.isfinite(logs["grad_norm"])
            usual = self._usual.pop(step)
            self._judge(step, losses, sum(losses), usual, broken=broken, exploded=exploded, fp16=False)
        if self._exploded < self.nan_steps:
            return
        raise TrainingError(
            f"the loss exploded for {self._exploded} steps in a row, up to step {step}",
            cause="nan",
            do="Lower optimizer.learning_rate, or look at the rows that the warnings name; limits.explosion says how "
            "far it may rise. The last good checkpoint is kept.",
        )

    def _judge(
        self, step: int, here: list[float], loss: float, usual: float | None, *, broken: bool, exploded: bool,
        fp16: bool,
    ) -> None:  # fmt: skip
        """Name the rows of an update that is left out; of any other, remember the loss.

        Args:
            here: shares of the loss by micro-batch of this rank; ``loss`` is that of all ranks.
            usual: what it was held against.
            broken: the gradient is no number.
        """
        if broken or not math.isfinite(loss):
            if not math.isfinite(sum(here)):
                self._tell(step, "loss", "is not finite", here)
            elif math.isfinite(loss) and not fp16:  # whose scaler looks for its scale in this way
                self._tell(step, "gradient", "is not finite", here)
        elif exploded:
            self._exploded += 1
            self._tell(step, "loss", f"rose from {usual:.2f} to {loss:.2f}", here)
        else:
            self._good.append(loss)
            self._exploded = 0

    def _tell(self, step: int, what: str, how: str, losses: list[float]) -> None:
        batches = rows_of_step(self.trainer, step)
        guilty = [rows for rows, loss in zip(batches, losses, strict=False) if not math.isfinite(loss)]
        rows = [row for batch in guilty or batches for row in batch]
        self.emit(
            Warn(
                f"the {what} of step {step} {how}: its update is left out",
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
