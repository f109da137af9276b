"""The real functions behind the app, as far as they need neither a GPU nor a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.run import Run
from finetui.planner.errors import RunError, UserError
from finetui.planner.recipe import Recipe
from finetui.tui.backend import Backend

QUICKSTART = Path(__file__).parents[2] / "presets" / "quickstart.yaml"


def test_what_can_be_chosen() -> None:
    backend = Backend()
    assert "H100" in backend.gpus()
    assert any(model.startswith("Qwen/") for model in backend.models())
    assert backend.machine()


def test_the_quickstart_is_planned_described_and_checked(tmp_path: Path) -> None:
    backend, recipe = Backend(), Recipe.load(QUICKSTART)
    plan = backend.plan(recipe)
    assert plan.model.parameters > 1_000_000
    (line,) = backend.data(recipe)
    assert line.startswith("messages, ")
    checks = list(backend.check(recipe, plan, tmp_path))
    assert {check.status for check in checks} <= {"ok", "warn", "fail"}
    assert any(check.name == "data" for check in checks)


def test_a_live_run_is_not_deleted(make_run: Callable[..., Run]) -> None:
    backend, live, over = Backend(), make_run("live"), make_run("over", state="finished")
    with pytest.raises(RunError, match="at work"):
        backend.delete(live)
    backend.delete(over)
    assert live.path.is_dir()
    assert not over.path.exists()


def test_models_that_were_used_come_first(tmp_path: Path) -> None:
    from finetui.tui.backend import _remember_model

    _remember_model("zeta/last")
    _remember_model("me/mine")
    assert Backend().models()[:2] == ["me/mine", "zeta/last"]


def test_a_job_is_for_the_system_that_its_name_says(tmp_path: Path) -> None:
    backend = Backend()
    recipe = Recipe.build({
        "model": "Qwen/Qwen3-0.6B", "tuning": "lora", "data": "org/rows", "hardware": {"gpu": "A100-80GB", "gpus": 1},
    })  # fmt: skip
    assert [system for system, _ in backend.systems("lambda")] == ["skypilot", "slurm"]
    assert backend.systems("lium") == [("slurm", ".sbatch")]
    said = "\n".join(backend.job(recipe, "lambda", False, tmp_path / "mine.sbatch"))
    assert "sbatch" in said
    assert (tmp_path / "mine.sbatch").read_text().startswith("#!/bin/bash")
    backend.job(recipe, "lambda", False, tmp_path / "mine.sky.yaml")
    assert "lambda" in (tmp_path / "mine.sky.yaml").read_text()
    with pytest.raises(UserError, match="does not say what the job is for"):
        backend.job(recipe, "lambda", False, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_what_can_not_be_done_here_is_offered_elsewhere() -> None:
    recipe = Recipe.build({"model": "Qwen/Qwen3-0.6B", "tuning": "qlora", "optimizer": {"name": "paged-adamw-8bit"}})
    assert any(row.plan.fits for row in Backend().offers(recipe, False))


def test_whose_file_it_is(tmp_path: Path) -> None:
    file = tmp_path / "some.yml"
    file.write_text("base_model: a/b\nadapter: lora\nmicro_batch_size: 2\nsequence_len: 512\n")
    assert Backend().tool_of(file) == "Axolotl"
    assert Backend().tool_of(QUICKSTART) == ""
    assert Backend().tool_of(tmp_path / "gone.yml") == ""


def test_models_are_those_of_the_gpu_that_the_recipe_names() -> None:
    from finetui.planner.hub_search import shipped

    found = Backend().models_on(Recipe.build({"model": "a/b", "hardware": {"gpu": "T4"}}), 1024)
    assert (found.gpu, found.length) == ("T4", 1024)
    assert sorted(row.name for row in found.rows) == sorted(shipped())
