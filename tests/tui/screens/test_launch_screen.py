"""Launch: checks fill in, enter starts what is shown, and a failed check is worth a question."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetui.engine.run import Run
from finetui.planner.errors import RunError
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.backend import Backend
from finetui.tui.widgets.check_list import CheckList
from finetui.tui.widgets.field import Field
from finetui.tui.widgets.recipe_view import RecipeView
from finetui.tui.widgets.text_block import StartRow, TextBlock

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Failed:
    name: str = "disk"
    status: str = "fail"
    detail: str = "2 GiB free, 18 GiB needed"
    do: str = "Free some space."


async def test_checks_command_and_recipe_are_shown(app_of: AppOf, settle: Settle) -> None:
    app = app_of("launch")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        checks = app.screen.query_one(CheckList).text
        assert checks.startswith("! GPU 0 is idle")
        assert "✔ disk" in checks
        assert "finetui run Qwen/Qwen3-8B --tuning qlora" in app.screen.query_one("#command-text", TextBlock).text
        assert "type: qlora" in app.screen.query_one(RecipeView).text


async def test_enter_starts_and_goes_to_monitor(app_of: AppOf, settle: Settle, calls: list[Any]) -> None:
    app = app_of("launch")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert calls == [("start", "Qwen/Qwen3-8B", None)]
        assert app.current_mode == "monitor"
        assert app.watched is not None


async def test_a_failed_check_is_asked_about(app_of: AppOf, backend: Backend, settle: Settle, calls: list[Any]) -> None:
    app = app_of("launch", backend=replace(backend, check=lambda recipe, plan, root: [Failed()]))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "although 1 failed" in app.screen.query_one(StartRow).text
        await pilot.press("enter")
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert calls == []
        await pilot.press("enter", "y")
        await settle(pilot)
        assert [call[0] for call in calls] == ["start"]


async def test_a_start_that_fails_is_said_and_can_be_tried_again(
    app_of: AppOf, backend: Backend, settle: Settle
) -> None:
    def refuse(recipe: Recipe, plan: Plan, root: Path, name: str | None) -> Run:
        raise RunError("the run directory can't be made (No space left on device)", where=str(root))

    app = app_of("launch", backend=replace(backend, start=refuse))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert app.current_mode == "launch"
        assert "start the run" in app.screen.query_one(StartRow).text
        assert any("No space left" in note.message for note in app._notifications)


async def test_checks_that_break_start_nothing_unasked(
    app_of: AppOf, backend: Backend, settle: Settle, calls: list[Any]
) -> None:
    def broken(recipe: Recipe, plan: Plan, root: Path) -> list[Any]:
        raise OSError("nvml")

    app = app_of("launch", backend=replace(backend, check=broken))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert calls == []


async def test_the_command_is_copied(app_of: AppOf, settle: Settle) -> None:
    app = app_of("launch")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("y")
        assert app.clipboard.startswith("finetui run Qwen/Qwen3-8B --tuning qlora --data /data/support.jsonl")


async def test_without_a_plan_there_is_nothing_to_start(app_of: AppOf, settle: Settle, calls: list[Any]) -> None:
    app = app_of("launch", recipe=Recipe.build({"model": "missing/model"}))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "no plan to start yet" in app.screen.query_one(StartRow).text
        await pilot.press("enter", "y")
        assert calls == []


def launch_field(app: FinetuiApp, key: str) -> Field:
    return app.screen.query_one(f"#field-{key}", Field)


async def test_limits_are_set_here_and_belong_to_the_recipe(
    app_of: AppOf, settle: Settle, tmp_path: Path, calls: list[Any]
) -> None:
    Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "qlora", "epochs": 2}).save(tmp_path / "mine.yaml")
    app = app_of("launch", recipe=Recipe.load(tmp_path / "mine.yaml"), recipe_path=tmp_path / "mine.yaml")
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot)
        assert "as mine.yaml says" in str(app.screen.query_one("#recipe").border_title)
        launch_field(app, "limits-hours").focus()
        await pilot.press("enter", *"12", "enter")
        await settle(pilot)
        launch_field(app, "limits-restarts").focus()
        await pilot.press("right")
        await settle(pilot)
        launch_field(app, "limits-at_end").focus()
        await pilot.press("enter", *"echo done", "enter")
        await settle(pilot)
        assert app.recipe is not None
        assert (app.recipe.limits.hours, app.recipe.limits.restarts) == (12, 5)
        assert (app.recipe.limits.at_end.do, app.recipe.limits.at_end.command) == ("command", "echo done")
        command = " ".join(app.screen.query_one("#command-text", TextBlock).text.split())
        for words in ("limits.hours=12", "limits.at_end.command=echo done"):
            assert words in command
        recipe = app.screen.query_one(RecipeView).text
        assert "+   hours: 12" in recipe
        assert "  epochs: 2" in recipe
        assert "6 lines differ from mine.yaml" in str(app.screen.query_one("#recipe").border_title)
        await pilot.press("a")
        await settle(pilot)
        assert app.recipe.limits.at_end.do == "nothing"
        app.screen.query_one(StartRow).focus()
        await pilot.press("enter")
        await settle(pilot)
        assert calls
        assert calls[0][0] == "start"


async def test_a_limit_that_can_not_be_is_told_beside_it(app_of: AppOf, settle: Settle, calls: list[Any]) -> None:
    app = app_of("launch")
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot)
        launch_field(app, "limits-hours").focus()
        await pilot.press("enter", *"-1", "enter")
        await settle(pilot)
        assert "out of range" in launch_field(app, "limits-hours").text
        app.screen.query_one(StartRow).focus()
        await pilot.press("enter")
        await settle(pilot)
        assert calls == []
