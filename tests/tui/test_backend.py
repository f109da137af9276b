"""The real functions behind the app, as far as they need neither a GPU nor a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.run import Run
from finetui.planner.errors import RunError
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
