"""Which trainer carries out which method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ...planner.objective import PREFERENCE_METHODS
from ...planner.plan import Resolved
from ...planner.recipe import Recipe
from ...planner.rollout import ROLLOUT_METHODS, rollouts
from ..models.load import Emit
from .base import RunTrainer
from .job import Job
from .order import Order, RolloutOrder

#: Methods that answer no held-out prompts beside their training: a score is no answer, and rollouts are shown as such.
SHOWS_ITSELF = frozenset({"reward", *ROLLOUT_METHODS})


def usable_rows(recipe: Recipe, resolved: Resolved, rows: Any, emit: Emit) -> Any:
    """The prepared rows without those that a method can't use.

    Raises:
        DataError: none is left.
    """
    if resolved.method not in ROLLOUT_METHODS:
        return rows
    from .rl import with_room

    room = resolved.sequence_length - rollouts(recipe, resolved.sequence_length).max_completion_length
    held_out = rows.evaluation
    return dataclasses.replace(
        rows,
        train=with_room(rows.train, room, emit),
        evaluation=None if held_out is None else with_room(held_out, room, emit),
    )


def order_for(recipe: Recipe, resolved: Resolved, rows: Any, steps: int, rank: int, world: int) -> Order:
    """The order in which a method trains on its prepared rows."""
    common: dict[str, Any] = {
        "rows": len(rows.train),
        "steps": steps,
        "micro_batch": resolved.micro_batch,
        "accumulation": resolved.accumulation,
        "rank": rank,
        "world": world,
        "seed": resolved.seed,
    }
    if resolved.method not in ROLLOUT_METHODS:
        # KTO compares the answers of a micro-batch with each other's prompts, so chance has to put them together.
        sorts = resolved.method != "kto" and resolved.accumulation * world > 1
        return Order(**common, lengths=rows.lengths() if sorts else None)
    settled = rollouts(recipe, resolved.sequence_length)
    return RolloutOrder(**common, generations=settled.num_generations, iterations=settled.num_iterations)


def maker_for(method: str) -> Callable[[Job], RunTrainer]:
    """What makes the trainer of a method; all that it needs is imported here."""
    if method in ("sft", "pretrain"):
        from .sft import sft_trainer

        return sft_trainer
    if method == "distill":
        from .distill import distill_trainer

        return distill_trainer
    if method in PREFERENCE_METHODS:
        from .preference import preference_trainer

        return preference_trainer
    if method == "ppo":
        from .ppo import ppo_trainer

        return ppo_trainer
    if method in ROLLOUT_METHODS:
        from .rl import rollout_trainer

        return rollout_trainer
    assert method == "reward", f"no trainer for {method}"
    from .reward import reward_trainer

    return reward_trainer


def before_training(trainer: Any, job: Job) -> bool:
    """What a method does once, before its first step; False if the run was asked to stop meanwhile."""
    if getattr(trainer, "precompute_ref_logps", False):
        from .reference import precompute

        return precompute(trainer, job)
    return True
