"""The weights that did best on held-out rows: kept beside the checkpoints, and made the result where training went on
to something worse. Without an improvement for some evaluations in a row, training ends.

What was measured before is read from the run's own events, so that a run that is resumed judges as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..events import LogLine, read_events
from ..models.load import Emit
from ..output import written_whole
from ..run import Run
from .save import save_result

NOTE = "training.json"
"""In the folder of a result: the step it is of, and its held-out loss (or reward)."""


class KeepsBest(TrainerCallback):
    """After each evaluation: keep the weights if they are the best so far, and end training that no longer improves.

    Args:
        base: where the base model lies, whose other files go with the weights.
        patience: evaluations in a row without an improvement after which training ends.
    """

    def __init__(self, run: Run, tokenizer: Any, base: Path, emit: Emit, patience: int | None) -> None:
        self.run, self.tokenizer, self.base, self.emit, self.patience = run, tokenizer, base, emit, patience
        self.whole_model: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
        """Gives the model to write; every rank has to ask. None: the one that the trainer hands to callbacks."""
        self.measured: dict[int, float] = {}
        """Loss (the negative of a reward) by step."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluations of earlier attempts, as far as this one goes on from."""
        told = told_losses(self.run)
        self.measured |= {step: loss for step, loss in told.items() if 0 < step <= state.global_step}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **more: Any,
    ) -> None:
        """Judge, of the same figures on every rank."""
        if not state.global_step or metrics is None:  # step 0 is the model that training began with
            return
        loss = metrics["eval_loss"] if "eval_loss" in metrics else -metrics["eval_reward"]
        before = min(self.measured.values(), default=float("inf"))
        self.measured[state.global_step] = loss
        if loss < before:
            with self.whole_model() if self.whole_model else contextlib.nullcontext(more["model"]) as model:
                if args.should_save:
                    save_result(self.run.best_path, model, self.tokenizer, self.base)
                    note(self.run.best_path, state.global_step, loss)
        since = self._since()
        if self.patience is not None and since >= self.patience and state.global_step < state.max_steps:
            best = min(self.measured, key=lambda step: (self.measured[step], step))
            words = f"ended early: {since} evaluations without improvement on step {best}"
            self.emit(LogLine(0, words))
            control.should_training_stop = True

    def _since(self) -> int:
        """Evaluations since the best one."""
        steps = sorted(self.measured)
        best = min(steps, key=lambda step: (self.measured[step], step))
        return len(steps) - 1 - steps.index(best)


def told_losses(run: Run) -> dict[int, float]:
    """The held-out loss (the negative of a reward) by step, as events tell it; of a repeated step the latest."""
    losses: dict[int, float] = {}
    for event in read_events(run.events_path):
        if event.type == "eval":
            losses[event.data["step"]] = float(event.data["loss"])
        elif event.type == "metrics" and "eval_reward" in event.data["values"]:
            losses[event.data["step"]] = -float(event.data["values"]["eval_reward"])
    return losses


def note(folder: Path, step: int, loss: float | None) -> None:
    """Say in a result's folder what it is."""
    (folder / NOTE).write_text(json.dumps({"step": step, "held_out_loss": loss}) + "\n", encoding="utf-8")


def take_best(best: Path, output: Path, last_loss: float | None) -> int | None:
    """Make the best weights the result if they did better than the last ones; their step, or None."""
    if not (best / NOTE).is_file() or last_loss is None:
        return None
    told = json.loads((best / NOTE).read_text(encoding="utf-8"))
    if told["held_out_loss"] >= last_loss:
        return None
    with written_whole(output) as partial:
        shutil.copytree(best, partial, dirs_exist_ok=True)
    return int(told["step"])
