"""Models: all that fits on the GPU of the plan; choosing one plans it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from textual.widgets import DataTable, Input

from finetui.planner.errors import HardwareError
from finetui.planner.fit import Fit
from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend
from finetui.tui.model_list import ModelRow
from finetui.tui.screens.models import ModelFacts, Models
from finetui.tui.screens.plan import PlanScreen

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


def rows(app: FinetuiApp) -> list[list[str]]:
    table = app.screen.query_one(DataTable)
    return [[str(cell).strip() for cell in table.get_row_at(index)] for index in range(table.row_count)]


async def test_what_fits_with_its_memory_and_speed(app_of: AppOf, settle: Settle) -> None:
    app = app_of(recipe=Recipe.build({"model": "a/b", "tuning": "qlora", "hardware": {"gpu": "RTX 4090"}}))
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press("b")
        await settle(pilot)
        assert isinstance(app.screen, Models)
        dialog = app.screen.query_one("#dialog")
        assert str(dialog.border_title) == "models: 3 of 4 fit on one RTX 4090, by size"
        assert str(dialog.border_subtitle) == "GiB at micro batch 1, rows of 2,048 tokens"
        names = [row[0] for row in rows(app)]
        assert names == ["Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"]
        assert rows(app)[0][1:5] == ["30.0 B", "–", "–", "✔ 20.6"]
        assert rows(app)[2][2:5] == ["✔ 5.5", "✔ 2.2", "✔ 1.4"]
        facts = app.screen.query_one(ModelFacts)
        assert "30.0 B parameters, 3.00 B at work per token" in facts.text
        await pilot.press("s")
        assert "by speed" in str(dialog.border_title)
        assert rows(app)[0][0] == "Qwen/Qwen3-0.6B"
        await pilot.press("f")
        assert rows(app)[-1][0] == "meta-llama/Llama-3.1-70B"
        await pilot.press("j", "k", "j", "j", "j")
        await pilot.pause()
        assert "✘ needs 46.6 of 23.6 GiB at least" in facts.text


async def test_enter_plans_it_with_a_tuning_that_fits(app_of: AppOf, settle: Settle) -> None:
    draft = {"model": "a/b", "tuning": {"type": "lora", "rank": 8}, "hardware": {"gpu": "RTX 4090"}}
    app = app_of(recipe=Recipe.build(draft))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("b")
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert isinstance(app.screen, PlanScreen)
        assert app.draft["model"] == "Qwen/Qwen3-30B-A3B"
        assert app.draft["tuning"]["type"] == "qlora"
        assert app.plan is not None
        assert app.plan.model.name == "Qwen/Qwen3-30B-A3B"
        assert app.edited


async def test_a_filter_and_a_way_back(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        before = dict(app.draft)
        await pilot.press("b")
        await settle(pilot)
        await pilot.press("slash")
        app.screen.query_one(Input).value = "nothing has [this]"
        await pilot.press("enter")
        await settle(pilot)
        assert rows(app) == []
        await pilot.press("enter", "j")  # nothing to choose
        assert isinstance(app.screen, Models)
        assert "filter 'nothing has [this]'" in app.screen.query_one("#dialog").border_title.replace("\\", "")
        await pilot.press("escape")
        await settle(pilot)
        assert app.draft == before


async def test_a_model_can_be_chosen_while_the_plan_is_not_right_yet(app_of: AppOf, settle: Settle) -> None:
    app = app_of(recipe=Recipe.build({"model": "a/b", "hardware": {"gpu": "RTX 4090"}}))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        screen = app.screen
        assert isinstance(screen, PlanScreen)
        screen.set_value("method", "distill")  # whose teacher is not said yet
        await settle(pilot)
        await pilot.press("b")
        await settle(pilot)
        assert isinstance(app.screen, Models)
        assert str(app.screen.query_one("#dialog").border_title).endswith("fit on one RTX 4090, by size")


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (90, "✔ full  21.7 of 23.6 GiB, paged-adamw-8bit, checkpointing selective, $0.122/M tokens"),
        (70, "✔ full  21.7 of 23.6 GiB, paged-adamw-8bit, $0.122/M tokens"),
        (50, "✔ full  21.7 of 23.6 GiB, $0.122/M tokens"),
    ],
)
def test_on_a_small_terminal_a_price_is_not_cut(width: int, told: str) -> None:
    how = ("bf16", "paged-adamw-8bit", "selective", 0.44, "runpod")
    fit = Fit("RTX-4090", 23.6, "full", 2048, True, 21.7, 22.0, 1000.0, *how)
    facts = ModelFacts()
    facts.show(ModelRow("a/b", 8, 8, 4096, {"full": fit}), 23.6, "full")
    assert "".join(text for text, _ in facts.draw(width, 2)[1]) == told


async def test_why_there_are_none(app_of: AppOf, settle: Settle, backend: Backend) -> None:
    def refuse(recipe: Recipe, length: int) -> Any:
        raise HardwareError("there is no GPU 'X9'", do="Did you mean 'A10'?")

    app = app_of(backend=replace(backend, models_on=refuse))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(pilot)
        await pilot.press("b")
        await settle(pilot)
        assert isinstance(app.screen, PlanScreen)
        assert [notice.message for notice in app._notifications] == ["there is no GPU 'X9'. Did you mean 'A10'?"]
