"""A recipe with every ``auto`` replaced by what its plan made of it, so that another machine comes to the same plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...planner.options import TUNING_KEYS
from ...planner.plan import Plan, Resolved
from ...planner.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

#: Keys of a recipe that :func:`_settle` sets.
_SETTLED = (
    "sequence_length", "batch_size", "micro_batch", "packing", "train_on", "tuning", "optimizer", "hardware",
    "checkpoint", "evaluation",
)  # fmt: skip


def pinned(recipe: Recipe, plan: Plan, plan_of: Callable[[Recipe], Plan], usd_per_h: float = 0.0) -> Recipe:
    """The recipe that asks for exactly this plan, on the machine that it finds itself on.

    Args:
        plan_of: plans a stage of a recipe with stages, each of which is pinned by itself.
        usd_per_h: price of the machine, by which ``limits.cost_usd`` counts; 0 leaves the recipe's own.
    """
    tree = recipe.to_dict()
    hardware = tree["hardware"] = dict(tree.get("hardware", {}))
    if usd_per_h > 0:
        hardware["usd_per_h"] = usd_per_h
    if recipe.stages:
        return _with_stages(recipe, tree, plan, plan_of)
    _settle(tree, recipe, plan.resolved)
    return Recipe.build(tree, source="the plan")


def _with_stages(recipe: Recipe, tree: dict[str, Any], plan: Plan, plan_of: Callable[[Recipe], Plan]) -> Recipe:
    from ...planner.stages import expand

    stages = []
    for step, written in zip(expand(recipe), tree["stages"], strict=True):
        if step.recipe is None:
            stages.append(written)
            continue
        whole = step.recipe.to_dict()
        _settle(whole, step.recipe, plan_of(step.recipe).resolved)
        # A stage that sets the batch in sequences must not inherit it in tokens.
        stages.append({**written, **{key: whole[key] for key in _SETTLED}, "batch_tokens": "auto"})
    tree["stages"] = stages
    tree["hardware"] = _of_machine(tree["hardware"], plan.resolved)
    return Recipe.build(tree, source="the plan")


def _settle(tree: dict[str, Any], recipe: Recipe, resolved: Resolved) -> None:
    """Put the values of a plan into the tree of its recipe, in place."""
    tree |= {
        "sequence_length": resolved.sequence_length,
        "batch_size": resolved.batch_size,
        "micro_batch": resolved.micro_batch,
        "packing": resolved.packing,
        "train_on": resolved.train_on,
    }
    tree.pop("batch_tokens", None)
    tuning = {"type": recipe.tuning.type, **tree.get("tuning", {})}
    if "alpha" in TUNING_KEYS[recipe.tuning.type]:
        tuning["alpha"] = resolved.alpha
    tree["tuning"] = tuning
    tree["optimizer"] = {
        **tree.get("optimizer", {}), "name": resolved.optimizer, "learning_rate": resolved.learning_rate
    }  # fmt: skip
    hardware = _of_machine(tree.get("hardware", {}), resolved)
    hardware |= {
        "checkpointing": resolved.checkpointing, "precision": resolved.precision, "graphs": resolved.graphs
    }  # fmt: skip
    if resolved.checkpointing == "selective":
        hardware["kept_layers"] = max(resolved.kept_layers, 1)
    tree["hardware"] = hardware
    tree["checkpoint"] = {**tree.get("checkpoint", {}), "every": resolved.checkpoint_every}
    tree["evaluation"] = {**tree.get("evaluation", {}), "every": resolved.eval_every}


def _of_machine(hardware: dict[str, Any], resolved: Resolved) -> dict[str, Any]:
    """The hardware section for the machine that the run will be on: as many GPUs, whichever numbers they have."""
    kept = {key: value for key, value in hardware.items() if key != "gpu"}
    return {**kept, "device": resolved.device, "gpus": resolved.world_size, "strategy": resolved.strategy}
