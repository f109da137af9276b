"""What can be gone on from by itself, and how: the same plan from the last checkpoint, or one that needs less memory.

A run is started again after what may not happen a second time: a hang, a rank that was killed, a GPU or a connection
that failed. What would only happen again is left to the user: wrong data, a recipe that can't work, a full disk. Out of
memory on a GPU is in between: with a smaller micro batch and as many more of them per step the same rows make the same
step, so that is tried where the planner finds that it fits.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from ...planner.calibration import out_of_memory, record
from ...planner.errors import FinetuiError, UserError
from ...planner.plan import Plan, Reason
from ...planner.recipe import PACKABLE_METHODS, Recipe
from ...planner.state import state_dir
from ..checkpoints.store import find
from ..planning import plan_for
from ..run import Run
from .outcome import Facts, Outcome, first_exit

#: What failures of a GPU, of its driver and of connections between ranks are told with.
_PASSING = ("cuda error", "cudnn error", "cublas_status", "nccl", "ecc error", "connection closed by peer",
            "connection reset by peer", "broken pipe", "dataloader worker", "heartbeat")  # fmt: skip
#: What a GPU reports when it was asked for something impossible: that would only happen again.
_LASTING = ("device-side assert", "no kernel image", "invalid device function", "invalid device ordinal")


@dataclass(frozen=True)
class Again:
    """How a run goes on by itself.

    Args:
        why: what happened, for the user.
        plan: the plan to go on with, if it is another one.
    """

    why: str
    plan: Plan | None = None


class Restarts:
    """Counts restarts in a row without a new checkpoint between them."""

    def __init__(self, run: Run, most: int) -> None:
        self.run, self.most = run, most
        self.count = 0
        self._step = self.newest()

    def newest(self) -> int:
        """Optimiser steps of the newest complete checkpoint; 0 without one."""
        found = find(self.run.path / "checkpoints")
        return found[-1].step if found else 0

    def left(self) -> bool:
        """Whether one more is allowed, which this notes down as made."""
        step = self.newest()
        if step > self._step:
            self.count, self._step = 0, step
        self.count += 1
        return self.count <= self.most

    def pause_s(self) -> float:
        """Seconds to wait before the next one: what was killed gives its memory and ports back first."""
        return min(30.0, 0.5 * 4.0 ** (self.count - 1))


def passes(facts: Facts, outcome: Outcome) -> bool:
    """Whether what ended an attempt may not happen again."""
    if outcome.state != "failed" or outcome.cause not in {"crash", "hang"}:
        return False
    if outcome.cause == "hang":
        return True
    if facts.exit_codes and first_exit(facts.exit_codes)[1] < 0:
        return True
    told = outcome.message.lower()
    return any(words in told for words in _PASSING) and not any(words in told for words in _LASTING)


def learn_from_oom(run: Run, plan: Plan, facts: Facts) -> None:
    """Note down what a rank held when its GPU had no more, so that the next plan of this kind expects it."""
    needed = max((told.needed_gib or 0.0 for told in facts.failures if told.cause == "oom"), default=0.0)
    if plan.resolved.device == "cuda" and needed:
        lesson = out_of_memory(plan, needed_gib=needed, run=run.name, time=time.time())
        if lesson is not None:
            record(lesson, state_dir())


def with_less_memory(recipe: Recipe, plan: Plan) -> Plan | None:
    """The plan with at most half the micro batch and the same rows per step, or None where that does not fit.

    Everything else stays as it was decided: only a run that computes the same can go on from its checkpoints.
    """
    resolved = plan.resolved
    share = resolved.micro_batch * resolved.accumulation
    smaller = [micro for micro in range(resolved.micro_batch // 2, 0, -1) if share % micro == 0]
    for micro in smaller:
        try:
            new = plan_for(recipe.with_overrides(pinned(recipe, plan, micro)))
        except UserError:  # such as methods that compare rows of one micro batch
            continue
        same = new.resolved.batch_size == resolved.batch_size and new.resolved.micro_batch == micro
        if same and new.fits and new.memory.device_gib < plan.memory.device_gib:
            why = f"a micro batch of {resolved.micro_batch} ran out of memory"
            steps = math.ceil(plan.time_s / plan.speed.step_s) if plan.speed.step_s else resolved.steps
            time_s = plan.time_s + steps * max(new.speed.step_s - plan.speed.step_s, 0.0)
            return replace(
                plan,
                resolved=replace(resolved, micro_batch=micro, accumulation=share // micro),
                memory=new.memory,
                speed=new.speed,
                time_s=time_s,
                cost=replace(plan.cost, usd=plan.cost.usd_per_h * time_s / 3600),
                reasons=[*plan.reasons, Reason("micro_batch", micro, why)],
                correction=new.correction,
                basis=new.basis,
            )
    return None


def pinned(recipe: Recipe, plan: Plan, micro: int) -> dict[str, object]:
    """Settings of the recipe that leave the planner no choice but the micro batch."""
    resolved = plan.resolved
    changes: dict[str, object] = {
        "micro_batch": micro,
        "batch_size": resolved.batch_size,
        "batch_tokens": "auto",
        "sequence_length": resolved.sequence_length,
        "optimizer.name": resolved.optimizer,
        "hardware.checkpointing": resolved.checkpointing,
        "hardware.precision": resolved.precision,
        "hardware.graphs": resolved.graphs,
        "hardware.gpus": resolved.gpus or 1,
        "hardware.strategy": resolved.strategy,
    }
    if resolved.checkpointing == "selective":
        changes["hardware.kept_layers"] = max(resolved.kept_layers, 1)
    if recipe.method in PACKABLE_METHODS:
        changes["packing"] = resolved.packing
    return changes


def again(run: Run, recipe: Recipe, plan: Plan, facts: Facts, outcome: Outcome, restarts: Restarts) -> Again | None:
    """How the run goes on by itself after an attempt that failed, or None where it must end."""
    if outcome.state == "failed" and outcome.cause == "oom" and any(t.cause == "oom" for t in facts.failures):
        try:
            learn_from_oom(run, plan, facts)
            smaller = with_less_memory(recipe, plan)
        except (FinetuiError, OSError) as error:
            print(f"no smaller plan: {error}", flush=True)
            return None
        if smaller is None or not restarts.left():
            return None
        return Again(outcome.message, smaller)
    return Again(outcome.message) if passes(facts, outcome) and restarts.left() else None
