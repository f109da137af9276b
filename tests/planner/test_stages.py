"""A recipe with stages: what each inherits, what is wrong with it, and the plan of all."""

from __future__ import annotations

from typing import Any

import pytest

from finetui.engine.planning import plan_for
from finetui.planner.errors import RecipeError
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe
from finetui.planner.stages import expand

WORKFLOW: dict[str, Any] = {
    "model": "Qwen/Qwen3-0.6B",
    "tuning": {"type": "lora", "rank": 32},
    "sequence_length": 1024,
    "optimizer": {"learning_rate": 1e-4, "warmup_ratio": 0.1},
    "hardware": {"gpu": "h100"},
    "stages": [
        {"method": "sft", "epochs": 2},
        {"method": "dpo", "optimizer": {"learning_rate": 5e-6}, "tuning": {"rank": 8}},
        {"do": "evaluate"},
        {"do": "export", "to": "merged"},
    ],
}


def test_a_stage_inherits_what_it_does_not_change() -> None:
    recipe = Recipe.build(WORKFLOW)
    sft, dpo, evaluate, export = expand(recipe)
    assert [step.name for step in (sft, dpo, evaluate, export)] == ["sft", "dpo", "evaluate", "export"]
    assert sft.recipe is not None
    assert dpo.recipe is not None
    assert sft.recipe.epochs == 2.0
    assert dpo.recipe.optimizer.learning_rate == 5e-6
    assert dpo.recipe.optimizer.warmup_ratio == 0.1
    assert dpo.recipe.tuning.rank == 8
    assert dpo.recipe.sequence_length == 1024
    assert evaluate.recipe is None
    assert not sft.recipe.stages
    assert Recipe.build(recipe.to_dict()) == recipe


def test_another_type_of_tuning_starts_anew() -> None:
    steps = expand(Recipe.build({**WORKFLOW, "stages": [{}, {"tuning": "full"}, {"name": "again", "epochs": 3}]}))
    assert [step.recipe.tuning.type for step in steps if step.recipe] == ["lora", "full", "lora"]
    assert [step.name for step in steps] == ["sft", "sft-2", "again"]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"do": "evaluate"}, {}], "nothing to evaluate yet"),
        ([{"epochs": -1}], r"stages.0 \(sft\): epochs"),
        ([{"metod": "dpo"}], "unknown key 'metod'. Did you mean 'method'"),
        ([{"model": "other/model"}], "model can't differ"),
        ([{}, {"do": "export", "epochs": 2}], "epochs has no effect"),
        ([{}, {"do": "merge", "to": "adapter"}], "for do: export"),
        ([{"tuning": {"start_from": "previous"}}], "no stage before"),
        ([{}, {"tuning": {"start_from": "previous", "rank": 8}}], "of another form"),
        ([{}, {"name": "a b"}], "name"),
    ],
)
def test_a_stage_that_can_not_work_is_named(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.build({**WORKFLOW, "stages": stages})


def test_all_stages_are_one_plan() -> None:
    plan = plan_for(Recipe.build(WORKFLOW))
    each = [plan_for(step.recipe) for step in expand(Recipe.build(WORKFLOW)) if step.recipe]
    assert plan.time_s == sum(one.time_s for one in each)
    assert plan.cost.usd == pytest.approx(sum(one.cost.usd for one in each))
    assert plan.cost.usd > 0
    assert plan.memory.device_gib == max(one.memory.device_gib for one in each)
    assert [(stage.name, stage.do, stage.method) for stage in plan.stages] == [
        ("sft", "train", "sft"), ("dpo", "train", "dpo"), ("evaluate", "evaluate", ""), ("export", "export", ""),
    ]  # fmt: skip
    assert plan.stages[0].time_s == each[0].time_s
    assert Plan.from_dict(plan.to_dict()) == plan


def test_paths_of_stages_are_relative_to_the_recipe(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: a/b\nstages:\n- data: ./rows.jsonl\n- {data: [{path: ./pairs.jsonl}]}\n- {do: export, path: out}\n"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    first, second, third = expand(recipe)
    assert first.recipe is not None
    assert first.recipe.data[0].path == str(tmp_path / "rows.jsonl")
    assert second.recipe is not None
    assert second.recipe.data[0].path == str(tmp_path / "pairs.jsonl")
    assert third.stage.path == str(tmp_path / "out")
