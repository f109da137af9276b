"""A run on another number of GPUs than it began with: the same rows in every step, cut up in another way.

The order of rows is a function of the seed, and losses are normalised over the whole step, so each step has the same
gradient however many ranks share it, to rounding. What belongs to a rank alone is its random numbers: a rank that was
there before goes on with its own, a new one begins with some that nobody else has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ...planner.errors import RunError, UserError
from ...planner.plan import Plan, Reason, Resolved
from ...planner.recipe import Recipe
from ...planner.rollout import ROLLOUT_METHODS
from ..durable import write_atomically
from ..events import LogLine
from ..planning import plan_for
from ..run import Run
from ..status import LIVE_STATES
from .recovery import pinned


def spread(run: Run, gpus: int | list[int]) -> Plan:
    """Change the plan of a run that is not at work so that it goes on with these GPUs (on the CPU: processes).

    Args:
        gpus: how many, or which.

    Raises:
        RunError: the run is at work, its batch can't be shared by so many, its completions belong to their ranks, or
            it does not fit on one of them any more.
        UserError: the machine has no such GPUs.
    """
    plan, recipe = run.plan, run.recipe
    resolved = plan.resolved
    chosen = list(range(gpus)) if isinstance(gpus, int) else gpus
    if run.status.state in LIVE_STATES:
        raise RunError("is at work", where=run.name, do=f"Stop it first with: finetui stop {run.name}")
    if plan.stages:
        raise RunError("has stages, each of which is a run of its own", where=run.name, do="Resume that one.")
    if resolved.method in ROLLOUT_METHODS and len(chosen) != resolved.world_size:
        what = f"{resolved.method} can't change its number of ranks: completions in use belong to those that made them"
        raise RunError(what, where=run.name, do=f"Resume it on {resolved.world_size}.")
    batch, world = resolved.batch_size, len(chosen)
    if world < 1 or batch % world:
        able = ", ".join(str(count) for count in range(1, min(batch, 64) + 1) if batch % count == 0)
        what = f"a step of {batch} rows can't be shared evenly by {world}"
        raise RunError(what, where=run.name, do=f"Choose a number of GPUs among {able}.")
    share = batch // world
    micro = max(size for size in range(1, min(share, resolved.micro_batch) + 1) if share % size == 0)
    placed = {"hardware.gpus": chosen if resolved.device == "cuda" else world}
    graphs = resolved.graphs and world == 1
    new: Plan | None = None
    for strategy in _strategies(recipe, resolved, world):
        wanted = {**placed, "hardware.strategy": strategy, "hardware.graphs": graphs}
        try:
            new = plan_for(recipe.with_overrides({**pinned(recipe, plan, micro), **wanted}))
        except UserError:
            if new is None:
                raise
            break  # it can't be split; what is wrong is that it does not fit otherwise
        if new.fits:
            break
    assert new is not None
    if not new.fits:
        need, have = new.memory.device_gib, new.hardware.memory_gib
        what = f"on {world} it would need {need:.1f} GiB each, and there are {have:.1f}"
        raise RunError(what, where=run.name, do="Choose other GPUs.")
    now = replace(
        resolved, gpus=new.resolved.gpus, strategy=strategy, micro_batch=micro, accumulation=share // micro,
        graphs=graphs,
    )  # fmt: skip
    why = f"resumed on {world} instead of {resolved.world_size}: the same {batch} rows make a step"
    changed = replace(
        plan,
        resolved=now,
        hardware=new.hardware,
        memory=new.memory,
        speed=new.speed,
        reasons=[*plan.reasons, Reason("gpus", world, why)],
        correction=new.correction,
        basis=new.basis,
    )
    write_atomically(run.path / "plan.json", changed.to_json() + "\n")
    run.append(LogLine(0, why))
    return changed


Strategy = Literal["single", "ddp", "fsdp"]


def _strategies(recipe: Recipe, resolved: Resolved, world: int) -> list[Strategy]:
    """How ranks may share the run, the best first: split if it was or was asked to be, else only where it must be."""
    if world == 1:
        return ["single"]
    if "fsdp" in (resolved.strategy, recipe.hardware.strategy):
        return ["fsdp"]
    return ["ddp", "fsdp"] if recipe.hardware.strategy == "auto" else ["ddp"]
