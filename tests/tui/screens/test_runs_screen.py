"""Runs: all of them, brought up to date in place, with why each one ended."""

from __future__ import annotations

import math
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from textual.widgets import DataTable, Input

from finetui.engine.events import EventLog, Step
from finetui.engine.run import Run
from finetui.tui.app import FinetuiApp
from finetui.tui.run_table import SORTS, RunScanner, arranged
from finetui.tui.widgets.bars import KeyBar
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
        expected = ["newest", *(run.name for run in fleet[:4])]
        for _ in range(100):  # it looks once a second, later where the machine is busy
            await pilot.pause(0.2)
            if [row[1] for row in rows(app)] == expected:
                break
        assert [row[1] for row in rows(app)] == expected
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


async def test_sorted_and_filtered_the_cursor_stays_on_its_run(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("runs")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press("j", "s")
        figures = [row[4] for row in rows(app)]
        known = sorted(figure for figure in figures if figure != "–")
        assert figures == [*known, *["–"] * (len(figures) - len(known))]
        assert "by held-out loss" in str(app.screen.query_one(DataTable).border_title)
        table = app.screen.query_one(DataTable)
        assert rows(app)[table.cursor_row][1] == fleet[1].name
        await pilot.press("slash")
        app.screen.query_one(Input).value = "failed qwen3"
        await pilot.press("enter")
        await settle(pilot)
        assert sorted(row[1] for row in rows(app)) == ["qwen3-8b-full", "qwen3-8b-lr1e3"]
        assert "2 of 5" in str(table.border_title)
        await pilot.press("slash")
        app.screen.query_one(Input).value = "no such [run]"
        await pilot.press("enter")
        await settle(pilot)
        assert rows(app) == []
        assert "no run has 'no such [run]' in it" in app.screen.query_one(RunDetails).text
        await pilot.press("enter", "x", "D", "y", "slash")
        app.screen.query_one(Input).value = ""
        await pilot.press("enter")
        await settle(pilot)
        assert len(rows(app)) == 5


def test_figures_that_there_are_none_of_come_last(fleet: list[Run], now: float) -> None:
    found = RunScanner(lambda: fleet, lambda: now).scan()
    for sort in SORTS:
        assert sorted(row.run.name for row in arranged(found, sort=sort)) == sorted(run.name for run in fleet)
    losses = [row.loss for row in arranged(found, sort="loss")]
    assert math.isnan(losses[-1])
    assert losses[:-1] == sorted(losses[:-1])
    assert [row.run.name for row in arranged(found)] == [run.name for run in fleet]


async def test_a_first_run_is_two_keys_away(app_of: AppOf, settle: Settle) -> None:
    app = app_of("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "b First run" in app.screen.query_one(KeyBar).text
        await pilot.press("b")
        await settle(pilot)
        assert app.current_mode == "launch"
        assert Path(app.draft["model"]).name == "tiny"
        assert app.recipe_path is not None
        assert app.recipe_path.name == "quickstart.yaml"


async def test_a_plan_that_is_not_saved_is_not_lost_to_a_first_run(app_of: AppOf, settle: Settle) -> None:
    app = app_of("runs")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(pilot)
        app.edited = True
        await pilot.press("b")
        await settle(pilot)
        assert app.current_mode == "runs"
        assert "not saved" in " ".join(notice.message for notice in app._notifications)


async def test_with_runs_there_the_first_one_is_not_offered(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("runs")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        for mode in ("runs", "monitor", "compare", "logs"):
            app.switch_mode(mode)
            await settle(pilot)
            assert "First run" not in app.screen.query_one(KeyBar).text
            before = app.draft
            await pilot.press("b")
            await settle(pilot)
            assert (app.current_mode, app.draft) == (mode, before)
