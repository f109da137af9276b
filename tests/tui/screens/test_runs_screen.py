"""Runs: all of them, brought up to date in place, with why each one ended."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from typing import Any

from textual.widgets import DataTable

from finetui.engine.events import EventLog, Step
from finetui.engine.run import Run
from finetui.tui.app import FinetuiApp
from finetui.tui.widgets.run_details import RunDetails

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


def rows(app: FinetuiApp) -> list[list[str]]:
    table = app.screen.query_one(DataTable)
    return [[str(cell) for cell in table.get_row_at(index)] for index in range(table.row_count)]


async def test_every_run_and_why_it_ended(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert [row[1] for row in rows(app)] == [run.name for run in fleet]
        assert [row[0] for row in rows(app)] == ["● running", "✔ finished", "✘ failed: oom", "✘ failed: nan", "? lost"]
        assert rows(app)[3][2:] == ["160/412", "nan", "1.5178"]
        await pilot.press("j", "down")
        details = app.screen.query_one(RunDetails).text
        assert "CUDA out of memory" in details
        assert "Try: Use hardware.checkpointing: full" in details
        assert f"~/runs/{fleet[2].name}" in details


async def test_changes_appear_in_place(
    app_of: AppOf, settle: Settle, fleet: list[Run], make_run: Callable[..., Run], now: float
) -> None:
    app = app_of("runs")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press("j")
        with EventLog(fleet[0].events_path) as log:
            log.append(Step(241, 0.6, 0.5432, 1e-4, 0.4, 1, 5000.0, 3.2, 412))
        shutil.rmtree(fleet[4].path)
        make_run("newest", created=now)
        await pilot.pause(1.5)
        assert [row[1] for row in rows(app)] == ["newest", *(run.name for run in fleet[:4])]
        assert rows(app)[1][2:4] == ["241/412", "0.5432"]
        table = app.screen.query_one(DataTable)
        assert rows(app)[table.cursor_row][1] == fleet[1].name


async def test_enter_opens_the_run(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("j", "enter")
        await settle(pilot)
        assert app.current_mode == "monitor"
        assert app.watched is not None
        assert app.watched.name == fleet[1].name


async def test_resume_stop_and_reuse(app_of: AppOf, settle: Settle, fleet: list[Run], calls: list[Any]) -> None:
    app = app_of("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("x", "y", "j", "j", "r")
        await settle(pilot)
        assert calls == [("stop", fleet[0].name), ("resume", fleet[2].name)]
        await pilot.press("e")
        await settle(pilot)
        assert app.current_mode == "plan"
        assert app.draft["model"] == "Qwen/Qwen3-8B"
        assert app.recipe_path is None


async def test_delete_asks_and_spares_a_live_run(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("D", "y")
        await settle(pilot)
        assert fleet[0].path.is_dir()
        await pilot.press("j", "D", "enter")
        await settle(pilot)
        assert fleet[1].path.is_dir()
        await pilot.press("D", "y")
        await pilot.pause(1.5)
        assert not fleet[1].path.exists()
        assert len(rows(app)) == 4


async def test_no_runs(app_of: AppOf, settle: Settle) -> None:
    app = app_of("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("enter", "x", "r", "D", "y", "e", "j", "k")
        assert "no runs yet" in app.screen.query_one(RunDetails).text


async def test_columns_follow_the_width(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert len(rows(app)[0]) == 5
        await pilot.resize_terminal(160, 40)
        await settle(pilot)
        assert len(rows(app)[0]) == 10
        assert rows(app)[0][8] == "1×H100 SXM"
