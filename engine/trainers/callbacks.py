"""What a trainer tells and is told: events, TensorBoard, and requests from ``control/``.

One object, because it is one conversation: each optimiser step all ranks add up their counts and learn rank 0's
decision to stop or to write a checkpoint in a single reduction, so that all of them act on the same step. A rank
that is alone knows at once what was asked for, and is told of a step once the device is done with it (:mod:`.unread`).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluate import reduce_sum
from ..events import Eval, Fallback, MemoryUse, Metrics, Step, Warn
from ..models.load import Emit
from ..run import Run
from .base import RunTrainer
from .divergence import Divergence
from .settings import Length

_GIB = 2**30
#: Seconds between memory events of a rank once the first few steps are over.
_MEMORY_EVERY_S = 5.0
#: How PEFT names the factors of its adapters.
_FACTORS = re.compile(r"\.(?:lora|hada|lokr|vera_lambda)_")


class Reporter(TrainerCallback):
    """Speaks for one rank of one run.

    Args:
        run: where requests and state are.
        emit: appends an event.
        length: when to evaluate and to write checkpoints.
        rank: of this process; rank 0 speaks for all about everything but memory.
        track: also write TensorBoard files.
    """

    def __init__(self, run: Run, emit: Emit, length: Length, *, rank: int, track: bool) -> None:
        self.run, self.emit, self.length, self.rank = run, emit, length, rank
        self.trainer: RunTrainer
        self.divergence: Divergence
        self.stopped = False
        """The run was asked to stop, and did."""
        self.after_first_step: Callable[[], None] | None = None
        """Called once, when the first step of this attempt has been told; its time is no step's."""
        self._board = _Board(run.path / "tensorboard", emit) if track and rank == 0 else None
        self._marked = self._memory_told = time.perf_counter()
        self._totals: list[int] = [0]
        self._first_step = 0
        self._serving: int | None = None
        """The step by whose checkpoint a request is served."""
        self._unproven = True
        """This attempt has not saved yet: it does so after its first good step, to know that it can."""

    # --- the steps of a run, in the order in which the trainer calls them

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remember where this attempt begins."""
        self._first_step = state.global_step
        self._begin()
        if self._board is not None:
            self._board.begin(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check the gradients of the first steps."""
        if state.global_step - self._first_step < 2:
            self._warn_of_dead_gradients(self.trainer.trained_parameters())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Agree with the other ranks on counts and on what to do after this step."""
        asked = [0, 0, int(self.trainer.saver.failed)]
        if self.rank == 0:
            wanted = self.run.requested("checkpoint") and self._serving is None
            asked[:2] = [int(self.run.requested("stop")), int(wanted)]
        if self.trainer.late:
            stop, save, failed = asked
        else:
            counts = self.trainer.take_counts()
            agreed = reduce_sum(torch.cat([counts, counts.new_tensor(asked)]), args.device).tolist()
            *self._totals, stop, save, failed = agreed
        self.trainer.agree_on_failed_save(bool(failed))
        last = state.global_step >= self.length.steps
        if save:
            self._serving = state.global_step
        if stop and not last:
            self.stopped = True
            control.should_training_stop = True
            if self.rank == 0:
                self.run.update(state="stopping")
        control.should_log = True
        due = state.global_step % self.length.checkpoint_every == 0
        control.should_save = bool(last or stop or save or due or self._unproven)
        measured = last or state.global_step % self.length.eval_every == 0
        control.should_evaluate = self.trainer.held_out is not None and measured and not self.stopped

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Tell of one optimiser step; after too many that went wrong, the run fails here."""
        if not logs or "loss" not in logs:  # the closing summary of the trainer
            return
        now = time.perf_counter()
        seconds, self._marked = now - self._marked, now
        number, totals = state.global_step, self._totals
        if "figures" in logs:
            number, seconds = logs["step"], logs["seconds"]
            totals = [int(count) for count in logs["figures"]["counts"]]
        tokens, figures = totals[0], self.trainer.figures(totals)
        self.trainer.tokens += tokens
        loss, grad_norm = float(logs["loss"]), float(logs.get("grad_norm", math.nan))
        self._tell_memory(args.device, now, early=number - self._first_step <= 3)
        if self.rank == 0:
            if number == self._first_step + 1:
                self.run.update(state="stopping" if self.stopped else "running")
            step = Step(
                step=number,
                epoch=round(self.trainer.order.passes(number), 4),
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=grad_norm,
                tokens=self.trainer.tokens,
                tokens_per_s=round(tokens / seconds, 2),
                step_s=round(seconds, 6),
                steps=self.length.steps,
            )
            self.emit(step)
            if figures:
                self.emit(Metrics(step.step, _short(figures)))
            speed = f"{step.tokens_per_s:.0f} tok/s"
            print(f"step {step.step}/{step.steps}  loss {loss:.4f}  lr {step.learning_rate:.3g}  {speed}", flush=True)
            if self._board is not None:
                self._board.step(step, figures)
        verdict = self.divergence.judge(number, loss, grad_norm, logs.get("figures"))
        if verdict == "not finite" and number == state.global_step and not self.stopped:
            control.should_save = False
            self._serving = None if self._serving == number else self._serving  # by the next step, then
        if self.after_first_step is not None and not self.stopped:
            self.after_first_step()
            self.after_first_step = None
            self._begin()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Tell of a held-out loss."""
        assert metrics is not None
        if self.rank == 0:
            if "eval_loss" in metrics:  # rewards are measured without one
                self.emit(Eval(state.global_step, metrics["eval_loss"]))
            further = {name: value for name, value in metrics.items() if name != "eval_loss"}
            if further:
                self.emit(Metrics(state.global_step, _short(further)))
            head = next((name for name in ("eval_loss", "eval_reward") if name in metrics), None)
            if head is not None:
                print(f"step {state.global_step}  held-out {head.removeprefix('eval_')} {metrics[head]:.4f}")
            if self._board is not None:
                for name, value in metrics.items():
                    self._board.write(name.replace("eval_", "eval/", 1), value, state.global_step)
        self._begin()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The time that a checkpoint is waited for does not count as a step's."""
        self._unproven = False
        self._begin()

    def saved(self, step: int) -> None:
        """The checkpoint of a step is on the disk: if it was asked for, that is done."""
        served = self._serving  # which another thread may set
        if served is not None and step >= served and self.rank == 0:
            self.run.withdraw("checkpoint")
            self._serving = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close what is open."""
        if self._board is not None:
            self._board.close()

    def _begin(self) -> None:
        """What lies between two steps is over, and counts as no step's time."""
        self._marked = time.perf_counter()
        self.trainer.unread.begin()

    def _warn_of_dead_gradients(self, named: list[tuple[str, torch.nn.Parameter]]) -> None:
        """A weight that should learn and gets no gradient is a mistake that no loss curve shows.

        While an adapter's B is 0, as it is at first, dA = B' dY X' is 0 by rights; so A counts only once B is not, and
        likewise of other adapters, all of which are products with a factor that begins at 0.
        """
        names = [name for name, _ in named]
        weights = self.trainer.norms([p.detach() for _, p in named])
        gradients = self.trainer.norms([p.new_zeros(()) if p.grad is None else p.grad for _, p in named])
        unborn = {_layer_of(name) for name, weight in zip(names, weights, strict=True) if weight == 0} - {""}
        silent = [
            name
            for name, weight, norm in zip(names, weights, gradients, strict=True)
            if norm == 0 and (weight == 0 or _layer_of(name) not in unborn)
        ]
        if self.trainer.may_rest and not any(gradients):
            return
        if silent and self.rank == 0:
            shown = ", ".join(silent[:3]) + (" …" if len(silent) > 3 else "")
            what = f"{len(silent)} of {len(named)} trainable tensors get no gradient"
            self.emit(Warn(what, shown, "They stay as they are. Check tuning.targets and the data."))

    def _tell_memory(self, device: torch.device, now: float, *, early: bool) -> None:
        if not early and now - self._memory_told < _MEMORY_EVERY_S:
            return
        self._memory_told = now
        self.emit(memory_use(device, self.rank, self.trainer.pool_bytes))


def _layer_of(name: str) -> str:
    """The layer that a factor of an adapter belongs to, by the factor's name; empty of any other parameter."""
    found = _FACTORS.search(name)
    return name[: found.start()] if found else ""


def _short(figures: dict[str, float]) -> dict[str, float]:
    """Six digits, which is more than a single-precision mean is worth."""
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def memory_use(device: torch.device, rank: int, pool: int = 0) -> MemoryUse:
    """What the CUDA allocator holds; on the CPU, what the process holds.

    Args:
        pool: bytes that a replayed step uses without the allocator counting them.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        figures = [*held, max(torch.cuda.max_memory_allocated(device), held[0] + pool)]
    else:
        import resource

        import psutil

        now = psutil.Process().memory_info().rss
        figures = [now, now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
    allocated, reserved, peak = (round(figure / _GIB, 4) for figure in figures)
    return MemoryUse(rank, allocated, reserved, peak)


class _Board:
    """TensorBoard files; a resumed run overwrites the steps that it repeats.

    They are opened for the first figure: until there is one, nobody waits for TensorBoard to be imported.
    """

    def __init__(self, folder: Path, emit: Emit) -> None:
        self.folder, self.emit = folder, emit
        self._writer: Any = None
        self._first_step: int | None = None

    def begin(self, step: int) -> None:
        self._first_step = step

    def _open(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.emit(Fallback("no TensorBoard files", f"tensorboard is not installed ({error})"))
            return
        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None, flush_secs=10)

    def step(self, step: Step, figures: dict[str, float]) -> None:
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_s"):
            self.write(f"train/{name}", getattr(step, name), step.step)
        for name, value in figures.items():
            self.write(f"train/{name}", value, step.step)

    def write(self, name: str, value: float, step: int) -> None:
        if self._first_step is not None:
            self._open(self._first_step)
            self._first_step = None
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
