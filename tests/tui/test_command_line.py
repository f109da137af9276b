"""The command on the Launch screen is the run that enter starts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from finetui.planner.recipe import Recipe
from finetui.tui.command_line import as_shell, command_for
from finetui.tui.commands import run as run_module

TREES: list[dict[str, Any]] = [
    {"model": "Qwen/Qwen3-8B"},
    {"model": "Qwen/Qwen3-8B", "tuning": "full", "method": "pretrain", "epochs": 2.5},
    {"model": "a/b", "tuning": {"type": "qlora", "rank": 64, "targets": ["q_proj", "v_proj"]}, "batch_size": 32},
    {"model": "a/b", "data": "/data/it's here.jsonl", "optimizer": {"learning_rate": 5e-5, "name": "sgd"}},
    {"model": "a/b", "data": [{"path": "/d/t.jsonl", "limit": 5}, {"path": "/d/e.jsonl", "split": "eval"}]},
    {"model": "a/b", "hardware": {"gpus": [0, 1], "checkpointing": "full"}, "sequence_length": 4096, "seed": 7},
]


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_the_command_makes_the_same_recipe(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Recipe, dict[str, Any]]] = []
    recipe = Recipe.build(tree)
    monkeypatch.setattr(run_module, "plan_for", lambda recipe: None)

    def launch(recipe: Recipe, plan: object, **more: Any) -> _Started:
        seen.append((recipe, more))
        return _Started()

    monkeypatch.setattr(run_module, "launch", launch)
    words = shlex.split(as_shell(command_for(recipe, name="my-run", root=Path("/runs")), 60).replace("\\\n", " "))
    app = typer.Typer()
    app.command()(run_module.run)
    result = CliRunner().invoke(app, words[2:])
    assert result.exit_code == 0, result.output
    got, more = seen[0]
    assert got == recipe
    assert more["name"] == "my-run"
    assert more["out"] == Path("/runs")


class _Started:
    name, path = "my-run", Path("/runs/my-run")


def test_a_saved_recipe_is_named_by_its_file() -> None:
    assert command_for(Recipe.build(TREES[1]), path=Path("/x/r.yaml")) == ["finetui", "run", "/x/r.yaml", "--detach"]


def test_a_flag_and_its_value_stay_on_one_line() -> None:
    text = as_shell(["finetui", "run", "m", "--tuning", "qlora", "--name", "a-rather-long-name"], 30)
    assert text.splitlines() == ["finetui run m --tuning qlora \\", "    --name a-rather-long-name"]
