"""What may change between a checkpoint and what goes on from it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.checkpoints import store
from finetui.engine.checkpoints.continuation import before_resuming, changes, identity, model_mark, rows_mark
from finetui.engine.launcher import resume
from finetui.engine.run import Run
from finetui.planner.errors import RunError
from finetui.planner.recipe import Recipe

from ..conftest import RESOLVED

RECIPE = {"model": "tiny", "data": "rows.jsonl", "tuning": "lora"}


def known(recipe: dict[str, Any] | None = None, *, data: str = "", model: str = "", **resolved: Any) -> dict[str, Any]:
    built = Recipe.build({**RECIPE, **(recipe or {})})
    return identity(built, dataclasses.replace(RESOLVED, **resolved), data=data, model=model)


def told(*args: Any, **kwargs: Any) -> dict[str, bool]:
    """What differs from the usual identity, and whether it is refused."""
    return {change.what: bool(change.why) for change in changes(known(data="a", model="b"), known(*args, **kwargs))}


def test_nothing_has_changed() -> None:
    assert told() == {}


@pytest.mark.parametrize(
    ("resolved", "expected"),
    [
        ({"learning_rate": 1e-3}, {"learning_rate": True}),
        ({"rank": 16}, {"rank": True}),
        ({"optimizer": "sgd"}, {"optimizer": True}),
        ({"seed": 7}, {"seed": True}),
        ({"micro_batch": 2}, {"micro_batch": False, "batch_size": True}),
        ({"micro_batch": 1, "gpus": [0, 1]}, {"processes": False, "batch_size": True}),
        ({"steps": 30, "warmup_steps": 2}, {"steps": False}),
        ({"warmup_steps": 2}, {"warmup_steps": True}),
        ({"kernels": "on", "checkpointing": "full"}, {"kernels": False, "checkpointing": False}),
    ],
)
def test_changes_of_a_plan(resolved: dict[str, Any], expected: dict[str, bool]) -> None:
    assert told(**resolved) == expected


def test_more_processes_for_the_same_rows_are_welcome_but_not_while_completions_are_in_use() -> None:
    before, now = known(micro_batch=4), known(micro_batch=2, gpus=[0, 1], strategy="ddp")
    assert {c.what: c.why for c in changes(before, now)} == {"micro_batch": "", "processes": ""}
    before, now = known(micro_batch=4, method="grpo"), known(micro_batch=2, gpus=[0, 1], method="grpo")
    assert next(c for c in changes(before, now) if c.what == "processes").why


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"limits": {"hours": 2}, "checkpoint": {"keep": 5}}, {"limits.hours": False, "checkpoint.keep": False}),
        ({"optimizer": {"learning_rate": 1e-5}}, {"optimizer.learning_rate": True}),
        ({"hardware": {"gpus": 2}}, {"hardware.gpus": True}),
        ({"model": "elsewhere/tiny", "data": "moved.jsonl"}, {}),
    ],
)
def test_changes_of_a_recipe_that_became_a_plan_would_have_no_effect(
    recipe: dict[str, Any], expected: dict[str, bool]
) -> None:
    assert told(recipe) == expected


def test_other_rows_and_other_weights_are_refused() -> None:
    assert told(data="c", model="d") == {"the base model's weights": True, "the training rows": True}
    before, now = known(), known()
    assert not changes({**before, "content": ""}, {**now, "content": "b"})  # of a release that made no such mark
    (other,) = changes({**before, "content": "a"}, {**now, "content": "b"})
    assert other.what == "the training rows"
    assert other.why


def test_another_teacher_of_the_same_name_is_told() -> None:
    (other,) = changes({**known(), "teacher": "a"}, {**known(), "teacher": "b"})
    assert str(other) == "the teacher's weights: a -> b"
    assert not changes(known(), {**known(), "teacher": "b"})  # of a run that had none, or of an earlier release


def test_marks_change_with_content_and_not_with_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3_000_000))
    assert model_mark(tmp_path / "here") == model_mark(tmp_path / "there")
    with open(tmp_path / "there" / "model.safetensors", "r+b") as file:
        file.seek(1_500_000)
        file.write(b"x")
    assert model_mark(tmp_path / "here") != model_mark(tmp_path / "there")
    rows = [{"input_ids": [i]} for i in range(100)]
    assert rows_mark(rows) == rows_mark(list(rows))
    assert rows_mark(rows) != rows_mark(rows[:99])
    assert rows_mark(rows) != rows_mark(rows[::-1])


def _with_checkpoint(make_run: Callable[..., Run], facts: dict[str, Any] | None = None) -> Run:
    run = make_run(RECIPE)
    partial = store.begin(run.path / "checkpoints", 10)
    (partial / "adapter_model.safetensors").write_bytes(b"weights")
    store.commit(partial, 10, keep=1, facts=identity(run.recipe, run.plan.resolved) if facts is None else facts)
    run.update(state="stopped")
    return run


def test_resume_looks_before_it_starts_anything(make_run: Callable[..., Run]) -> None:
    run = _with_checkpoint(make_run)
    assert before_resuming(run) == []
    text = (run.path / "recipe.yaml").read_text()
    (run.path / "recipe.yaml").write_text(text + "limits: {hours: 3}\n")
    assert [str(change) for change in before_resuming(run)] == ["limits.hours: none -> 3.0"]
    (run.path / "recipe.yaml").write_text(text + "seed: 1\n")
    with pytest.raises(RunError, match=r"step 10.*seed: none -> 1"):
        resume(run)
    assert run.recorded.state == "stopped"


def test_a_checkpoint_of_an_earlier_release_is_refused_in_words(make_run: Callable[..., Run]) -> None:
    with pytest.raises(RunError, match="earlier release"):
        resume(_with_checkpoint(make_run, {"tokens": 3}))


def test_it_needs_no_torch() -> None:
    code = "import sys, finetui.engine.checkpoints.continuation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
