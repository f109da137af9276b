"""``finetui plan --exact``: the same plan with a memory that was followed."""

from __future__ import annotations

import json

import pytest

from finetui.engine.exact.answer import exact_plan
from finetui.engine.planning import plan_for
from finetui.planner.errors import HardwareError, RecipeError
from finetui.planner.hardware import PRESETS
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe

SHAPE = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip


def _recipe(folder, config, **more):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tree = {"model": str(folder), "sequence_length": 512, "micro_batch": 2, "hardware": {"gpu": "RTX-4090"}}
    return Recipe.build(tree | more, source="test")


def test_terms_add_up_and_lie_near_the_formula(tmp_path):
    recipe = _recipe(tmp_path / "m", {"model_type": "qwen3", **SHAPE})
    plan, formula = exact_plan(recipe), plan_for(recipe)
    assert plan.basis == "exact"
    assert sum(plan.memory.terms.values()) == pytest.approx(plan.memory.device_gib)
    assert plan.memory.allocated_gib == pytest.approx(max(plan.memory.moments.values()))
    assert plan.resolved == formula.resolved
    assert plan.memory.allocated_gib == pytest.approx(formula.memory.allocated_gib, rel=0.1)
    assert Plan.from_dict(json.loads(plan.to_json())).memory.moments.keys() == {"loss", "backward", "optimizer"}
    assert "torch" in next(reason.why for reason in plan.reasons if reason.setting == "basis")


def test_a_family_that_the_planner_reads_by_its_shapes_gets_exact_counts(tmp_path):
    recipe = _recipe(tmp_path / "m", {"model_type": "bitnet", **SHAPE})
    plan, formula = exact_plan(recipe), plan_for(recipe)
    assert any("read by its shapes" in line for line in formula.warnings)
    assert not any("less certain" in line for line in plan.warnings)
    assert plan.model.parameters != formula.model.parameters  # norms inside attention and MLP


def test_a_workflow_of_stages_is_refused():
    recipe = Recipe.load(PRESETS / "alignment.yaml", {"hardware.gpu": "H100"})
    with pytest.raises(RecipeError, match=r"--exact.*several stages"):
        exact_plan(recipe)


def test_a_cpu_is_refused(tmp_path):
    recipe = _recipe(tmp_path / "m", {"model_type": "llama", **SHAPE}, hardware={"device": "cpu"})
    with pytest.raises(HardwareError, match=r"--exact.*only the memory of a GPU"):
        exact_plan(recipe)
