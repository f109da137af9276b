"""A pinned recipe asks for the plan that it was made from, on whatever machine it is planned again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import finetui
from finetui.engine.cluster.pinned import pinned
from finetui.engine.planning import plan_for
from finetui.planner.hardware import Node, find_gpu
from finetui.planner.recipe import Recipe

PRESETS = Path(finetui.__file__).parent / "presets"


def machine(recipe: Recipe, gpu: str, count: int) -> Recipe:
    return recipe.with_overrides({"hardware.gpu": gpu, "hardware.gpus": count})


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("preset", ["quickstart", "qwen3-moe", "dpo", "grpo", "pretrain", "alignment"])
def test_presets_are_planned_alike(preset: str, count: int) -> None:
    recipe = machine(Recipe.load(PRESETS / f"{preset}.yaml"), "A100-80GB", count)
    plan = plan_for(recipe)
    # Through YAML, as a job file carries it.
    text = pinned(recipe, plan, plan_for, 2.5)
    again = plan_for(text, node=Node(find_gpu("A100-80GB"), count))
    assert again.resolved == plan.resolved
    assert [dataclasses.replace(stage, usd=0.0) for stage in again.stages] == [
        dataclasses.replace(stage, usd=0.0) for stage in plan.stages
    ]
    assert text.hardware.gpu is None  # it finds the GPU where it is
    assert again.cost.usd_per_h == 2.5


@pytest.mark.parametrize(
    "settings",
    [
        ["batch_tokens=65536"],
        ["tuning.type=full", "hardware.checkpointing=selective", "sequence_length=4096"],
        ["tuning.type=full", "hardware.gpu=RTX-4090"],
        ["optimizer.name=muon", "optimizer.schedule=wsd"],
        ["tuning.type=vera"],
        ["hardware.checkpointing=offload", "sequence_length=16384"],
    ],
    ids=lambda settings: settings[0],
)
def test_so_are_settings_that_lean_on_each_other(settings: list[str]) -> None:
    recipe = Recipe.build({"model": "Qwen/Qwen3-0.6B", "hardware": {"gpu": "H100"}}).with_overrides(settings)
    plan = plan_for(recipe)
    again = plan_for(pinned(recipe, plan, plan_for), node=Node(find_gpu(plan.hardware.gpu), 1))
    assert again.resolved == plan.resolved


def test_nothing_that_the_planner_chooses_is_left_to_the_other_machine() -> None:
    recipe = Recipe.build({"model": "Qwen/Qwen3-8B", "hardware": {"gpu": "H100"}})
    tree = pinned(recipe, plan_for(recipe), plan_for).model_dump()
    left = {key for key, value in tree.items() if value == "auto"}
    for name in ("tuning", "optimizer", "hardware", "checkpoint", "evaluation"):
        left |= {f"{name}.{key}" for key, value in tree[name].items() if value == "auto"}
    assert not left & {
        "sequence_length", "batch_size", "micro_batch", "packing", "train_on", "tuning.alpha", "optimizer.name",
        "optimizer.learning_rate", "hardware.device", "hardware.gpus", "hardware.strategy", "hardware.checkpointing",
        "hardware.precision", "hardware.graphs", "checkpoint.every", "evaluation.every",
    }  # fmt: skip
