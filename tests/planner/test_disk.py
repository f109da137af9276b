"""What a run writes, as its plan says it before anything is downloaded."""

from __future__ import annotations

from typing import Any

import pytest

from finetui.engine.planning import plan_for
from finetui.planner.plan import Disk, Plan
from finetui.planner.recipe import Recipe

GIB = 2**30


def disk(**recipe: Any) -> tuple[Disk, Plan]:
    asked = {"model": "meta-llama/Llama-3.1-8B", "hardware": {"gpu": "H200"}, **recipe}
    plan = plan_for(Recipe.build(asked))
    return plan.disk, plan


def test_an_adapter_is_small_and_a_full_model_is_not() -> None:
    lora, plan = disk(tuning="lora", optimizer={"name": "adamw"})
    assert lora.checkpoint_gib * GIB == pytest.approx(12 * plan.model.trainable, rel=0.2)
    full, plan = disk(tuning="full", optimizer={"name": "adamw"}, hardware={"gpu": "H200", "precision": "bf16"})
    # bf16 weights with bf16 moments: six bytes per parameter.
    assert full.checkpoint_gib * GIB == pytest.approx(6 * plan.model.parameters, rel=0.01)
    assert full.output_gib == pytest.approx(2 * plan.model.parameters / GIB, rel=0.01)


def test_the_one_being_written_counts_too() -> None:
    two, _ = disk(tuning="lora")
    five, _ = disk(tuning="lora", checkpoint={"keep": 5})
    assert two.checkpoints_gib == pytest.approx(3 * two.checkpoint_gib)
    assert five.checkpoints_gib == pytest.approx(6 * two.checkpoint_gib)


def test_paged_states_and_best_weights_are_on_the_disk() -> None:
    plain, _ = disk(tuning="lora", optimizer={"name": "adamw-8bit"})
    paged, _ = disk(tuning="lora", optimizer={"name": "paged-adamw-8bit"})
    assert paged == plain
    best, _ = disk(tuning="lora", optimizer={"name": "adamw-8bit"}, evaluation={"keep_best": True})
    assert best.output_gib > plain.output_gib


def test_a_plan_keeps_it_in_its_json() -> None:
    found, plan = disk(tuning="lora")
    assert Plan.from_dict(plan.to_dict()).disk == found
    assert plan.to_dict()["disk"]["checkpoint_gib"] > 0
