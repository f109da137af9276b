"""Plan: every edit plans anew, errors stand beside their field, nothing that is typed ends the app."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend
from finetui.tui.widgets.bars import KeyBar
from finetui.tui.widgets.facts import Facts, Reasons
from finetui.tui.widgets.field import Field
from finetui.tui.widgets.memory_bar import MemoryBar

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


def field(app: FinetuiApp, key: str) -> Field:
    return app.screen.query_one(f"#field-{key}", Field)


async def test_the_first_picture_says_everything(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        memory, facts = app.screen.query_one(MemoryBar).text, app.screen.query_one(Facts).text
        for word in ("✔ fits", "10.2 of 79.2 GiB", "9.3–11.3 GiB", "weights", "activations", "context"):
            assert word in memory
        for word in ("5,123 tokens/s", "22 min", "$0.91 at $2.49/h", "43.6 M of 8.19 B"):
            assert word in facts
        assert "messages, 41,208 rows, 6.75 M tok" in field(app, "data").text
        assert "checkpointing full" in app.screen.query_one(Reasons).text
        assert "? Help" in app.screen.query_one(KeyBar).text


async def test_an_arrow_plans_anew(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "tuning-type").focus()
        await pilot.press("left", "left")
        await settle(pilot)
        assert app.recipe is not None
        assert app.recipe.tuning.type == "full"
        assert "–" in field(app, "tuning-rank").text
        field(app, "hardware-gpu").focus()
        await pilot.press("right", "right")
        await settle(pilot)
        assert "✘ does not fit" in app.screen.query_one(MemoryBar).text
        assert "rank 8 instead" in app.screen.query_one(Reasons).text
        await pilot.press("m")
        await settle(pilot)
        assert "this machine" in field(app, "hardware-gpu").text


async def test_an_error_stands_below_its_field(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "tuning-rank").focus()
        await pilot.press("enter", *"many", "enter")
        await settle(pilot)
        assert "✘" in field(app, "tuning-rank").text
        assert "must be a whole number" in " ".join(field(app, "tuning-rank").text.split())
        assert "no plan: see tuning.rank" in app.screen.query_one(MemoryBar).text
        assert app.plan is None
        await pilot.press("enter", *"32", "enter")
        await settle(pilot)
        assert app.plan is not None
        assert app.plan.resolved.rank == 32


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("model", "missing/model", "Did you mean 'Qwen/Qwen3-8B'?"), ("data", "/d/broken.jsonl", "broken.jsonl:731")],
)
async def test_what_the_planner_refuses_is_said(
    app_of: AppOf, settle: Settle, key: str, value: str, message: str
) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, key).focus()
        await pilot.press("enter")
        app.screen.query_one(Input).value = value
        await pilot.press("enter")
        await settle(pilot)
        assert message in app.screen.query_one(Reasons).text + field(app, key).text


async def test_a_mistake_in_the_planner_costs_one_plan(app_of: AppOf, backend: Backend, settle: Settle) -> None:
    def fail(recipe: Recipe) -> Plan:
        raise ZeroDivisionError("oops")

    app = app_of(backend=replace(backend, plan=fail))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "ZeroDivisionError: oops" in app.screen.query_one(Reasons).text
        assert app.is_running


async def test_typing_plans_before_enter_and_escape_takes_it_back(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        field(app, "epochs").focus()
        await pilot.press("enter", *"3")
        await settle(pilot)
        assert app.plan is not None
        assert app.plan.time_s == 3960.0
        await pilot.press("escape")
        await settle(pilot)
        assert app.plan.time_s == 1320.0
        assert "epochs" not in app.draft


async def test_a_model_is_found_by_typing(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("enter", *"llama", "down", "enter")
        await settle(pilot)
        assert app.draft["model"] == "meta-llama/Llama-3.1-8B"


async def test_a_closed_choice_takes_nothing_else(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "tuning-type").focus()
        await pilot.press("enter", *"nosuch", "enter", "escape")
        await settle(pilot)
        assert app.recipe is not None
        assert app.recipe.tuning.type == "qlora"


async def test_only_the_last_of_many_edits_is_shown(app_of: AppOf, backend: Backend, settle: Settle) -> None:
    planned: list[int] = []

    def slow(recipe: Recipe) -> Plan:
        planned.append(recipe.tuning.rank)
        time.sleep(0.15 if recipe.tuning.rank == 32 else 0.0)
        return backend.plan(recipe)

    app = app_of(backend=replace(backend, plan=slow))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "tuning-rank").focus()
        await pilot.press("right")
        await pilot.pause(0.08)
        for _ in range(3):
            field(app, "tuning-rank").action_step(1)
        await settle(pilot)
        assert app.plan is not None
        assert app.plan.resolved.rank == 256
        assert len(planned) < 5


async def test_save_and_open(app_of: AppOf, settle: Settle, tmp_path: Path) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "epochs").focus()
        await pilot.press("right")
        await settle(pilot)
        await pilot.press("s")
        await settle(pilot)
        app.screen.query_one(Input).value = str(tmp_path / "mine.yaml")
        await pilot.press("enter")
        await settle(pilot)
        assert Recipe.load(tmp_path / "mine.yaml").epochs == 2
        await pilot.press("left")
        await settle(pilot)
        await pilot.press("o")
        await settle(pilot)
        app.screen.query_one(Input).value = str(tmp_path / "mine.yaml")
        await pilot.press("enter")
        await settle(pilot)
        assert app.draft["epochs"] == 2
        assert app.recipe_path == tmp_path / "mine.yaml"
        await pilot.press("o")
        app.screen.query_one(Input).value = str(tmp_path / "gone.yaml")
        await pilot.press("enter")
        await settle(pilot)
        assert app.draft["epochs"] == 2


async def test_leaving_an_unsaved_plan_takes_two_presses(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field(app, "epochs").focus()
        await pilot.press("right", "q")
        await pilot.pause()
        assert app._exit is False
        await pilot.press("q")
        await pilot.pause()
        assert app._exit is True
