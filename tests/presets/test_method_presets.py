"""A recipe for every method: each plans for a rented GPU, and trains some steps on the shipped tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from finetui.engine.planning import plan_for
from finetui.planner.recipe import Recipe

PRESETS = Path(__file__).parents[2] / "presets"
METHODS = (
    "pretrain", "distill", "dpo", "ipo", "orpo", "kto", "cpo", "simpo", "reward", "grpo", "rloo", "ppo", "gspo", "bco",
)  # fmt: skip
#: Recipes that are called by another name than their method's.
VARIANTS = {"gspo": "grpo", "bco": "kto"}


def test_the_script_makes_what_is_shipped() -> None:
    made = runpy.run_path(str(Path(__file__).parent / "make_pairs.py"))
    rows = made["pairs"]()
    for name, expected in (("pairs", rows), ("judged", made["judged"](rows)), ("sums", made["sums"]())):
        lines = (PRESETS / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == expected
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert made["text"]() == (PRESETS / "data" / "text.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_plans(name: str) -> None:
    recipe = Recipe.load(PRESETS / f"{name}.yaml", overrides=["hardware.gpu=H200"])
    method = VARIANTS.get(name, name)
    assert recipe.method == method
    plan = plan_for(recipe)
    assert plan.fits
    assert plan.resolved.method == method
    assert recipe.batch_size in ("auto", plan.resolved.batch_size)


@pytest.mark.parametrize("name", METHODS)
def test_trains(name: str, tmp_path: Path) -> None:
    trains(name, VARIANTS.get(name, name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [("first-finetune", "sft"), ("production", "sft")],
)
def test_workflows_train(name: str, method: str, tmp_path: Path) -> None:
    trains(name, method, tmp_path)


def trains(name: str, method: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import torch

    from finetui.engine.events import read_events
    from finetui.engine.run import Run
    from finetui.engine.worker import attempt

    torch.set_num_threads(1)
    small = {
        "model": str(PRESETS / "tiny"), "hardware.device": "cpu", "max_steps": 2, "batch_size": 8,
        "sequence_length": 128, "evaluation.holdout": 0.05 if method == "pretrain" else 0.02, "track": [],
    }  # fmt: skip
    if method in ("grpo", "rloo", "ppo"):
        small |= {"rollout.max_completion_length": 8}
    if method == "distill":
        small |= {"distillation.teacher": str(PRESETS / "tiny")}
    recipe = Recipe.load(PRESETS / f"{name}.yaml", overrides=small)
    run = Run.create(recipe, plan_for(recipe), root=tmp_path)
    assert attempt(run) == 0, run.events_path.read_text()
    told = list(read_events(run.events_path))
    assert [event.data["step"] for event in told if event.type == "step"] == [1, 2]
    figures = "eval" if method in ("sft", "pretrain") else "metrics"
    assert {event.data["step"] for event in told if event.type == figures} >= {0, 2}
    result = "model.safetensors" if recipe.tuning.type == "full" else "adapter_model.safetensors"
    assert (run.output_path / result).is_file()
    assert not [event.data for event in told if event.type == "warning"]
