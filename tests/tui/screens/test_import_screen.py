"""Import: another tool's file becomes the plan, and nothing of it is left out in silence."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.screens.import_file import ImportFile
from finetui.tui.widgets.fate_list import FateList

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]
AXOLOTL = """\
base_model: Qwen/Qwen3-8B
adapter: lora
lora_r: 8
lora_target_linear: true
datasets: [{path: org/rows, type: alpaca}]
sequence_len: 1024
micro_batch_size: 2
learning_rate: 1e-4
flash_attention: true
wandb_project: mine
gradient_checkpoint: true
"""
TRL = "model_name_or_path: Qwen/Qwen3-0.6B\ndataset_name: org/rows\nlearning_rate: 1e-5\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "axolotl.yml").write_text(AXOLOTL)
    (tmp_path / "trl.yml").write_text(TRL)
    return tmp_path


async def opened(pilot: Any, settle: Settle, key: str, path: Path) -> str:
    """The list of fates as words, once a file was asked for with a key of the Plan screen."""
    await pilot.press(key)
    await settle(pilot)
    pilot.app.screen.query_one(Input).value = str(path)
    await pilot.press("enter")
    await settle(pilot)
    return words_of(pilot.app)


def words_of(app: Any) -> str:
    return " ".join(app.screen.query_one(FateList).text.split())


@pytest.mark.parametrize("key", ["o", "i"])
async def test_what_became_of_each_key_then_the_plan(app_of: AppOf, settle: Settle, files: Path, key: str) -> None:
    app = app_of(recipe=Recipe.build({"model": "a/b", "hardware": {"gpu": "T4"}}))
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot)
        words = await opened(pilot, settle, key, files / "axolotl.yml")
        assert "Axolotl: 12 keys: 9 carried, 1 not needed, 1 not carried, 1 unknown" in words
        for told in ("Did you mean gradient_checkpointing?", "! wandb_project: mine would log there", "→ tuning.rank"):
            assert told in words
        assert words.index("unknown (1)") < words.index("not carried over (1)") < words.index("carried over (9)")
        await pilot.press("g", "g")
        await settle(pilot)
        assert "g GPUs 4" in words_of(app)
        await pilot.press("enter")
        await settle(pilot)
        assert app.recipe is not None
        assert (app.recipe.tuning.rank, app.recipe.batch_size) == (8, 8)
        assert app.recipe.hardware.gpu == "T4"  # which the form was about
        assert app.edited
        assert app.origin is not None
        assert app.origin[0] == "axolotl.yml"


async def test_what_was_not_carried_heads_the_recipe_that_is_saved(app_of: AppOf, settle: Settle, files: Path) -> None:
    app = app_of()
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot)
        await opened(pilot, settle, "i", files / "axolotl.yml")
        await pilot.press("enter")
        await settle(pilot)
        await pilot.press("s")
        await settle(pilot)
        app.screen.query_one(Input).value = str(files / "saved.yaml")
        await pilot.press("enter")
        await settle(pilot)
        assert "# - wandb_project: mine" in (files / "saved.yaml").read_text()
        app.open_recipe(files / "saved.yaml")  # of which nothing is left out
        recipe = Recipe.load(files / "saved.yaml")
        assert recipe.tuning.rank == 8
        assert app.recipe_text(recipe) == recipe.to_yaml()


async def test_a_file_that_does_not_say_enough_is_asked_about(app_of: AppOf, settle: Settle, files: Path) -> None:
    app = app_of()
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot)
        before = app.draft
        words = await opened(pilot, settle, "i", files / "trl.yml")
        assert "nothing in this file says whether it is for trl sft" in words
        await pilot.press("enter")
        await settle(pilot)
        assert isinstance(app.screen, ImportFile)  # there is nothing to plan yet
        await pilot.press("c")
        await settle(pilot)
        assert "c command trl sft" in words_of(app)
        assert "+ method: sft" in words_of(app)
        await pilot.press("f", "escape")
        await settle(pilot)
        assert app.draft is before


async def test_what_is_no_training_file_is_told(app_of: AppOf, settle: Settle, files: Path) -> None:
    app = app_of()
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot)
        (files / "other.yml").write_text("services: {web: {image: nginx}}\n")
        assert "no tool's training file has these keys" in await opened(pilot, settle, "i", files / "other.yml")
        await pilot.press("escape", "o")
        await settle(pilot)
        app.screen.query_one(Input).value = str(files / "other.yml")
        await pilot.press("enter")
        await settle(pilot)
        assert not isinstance(app.screen, ImportFile)
        assert [note.title for note in app._notifications] == ["not opened"]
