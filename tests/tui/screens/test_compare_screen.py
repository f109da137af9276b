"""Compare: the marked runs, on each axis, and new steps as they come."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from finetui.engine.events import EventLog, Step
from finetui.engine.run import Run
from finetui.tui.app import FinetuiApp
from finetui.tui.widgets.comparison_table import ComparisonTable
from finetui.tui.widgets.line_chart import LineChart

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


async def test_marked_runs_are_compared(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("runs")
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("space", "space", "k", "space", "c")
        await settle(pilot)
        assert app.current_mode == "compare"
        assert [run.name for run in app.marked] == [fleet[0].name, fleet[2].name]
        await pilot.pause(1.2)
        chart, table = app.screen.query_one(LineChart).text, app.screen.query_one(ComparisonTable).text
        assert f"A {fleet[0].name}" in chart
        assert f"B {fleet[2].name}" in chart
        assert "held-out, best" in table
        assert "no setting differs" in table


async def test_axes_and_figures(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("compare")
    app.marked = fleet[:2]
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        chart = app.screen.query_one(LineChart)
        ends = []
        for _ in range(4):
            ends.append(chart.text.splitlines()[-2].split("│")[1].split("0", 1)[1].strip())
            await pilot.press("a")
        assert ends == ["step 412", "6.75 M tokens", "22 min", "$0.92"]
        await pilot.press("m", "y")
        assert chart.text.startswith("╭─ mean loss over step")
        assert len(app.screen._contenders[0].curve("mean loss", "$").buckets) == 240
        await pilot.press("m")
        assert chart.text.startswith("╭─ held-out loss over step")
        assert "step 400" in chart.text


@pytest.mark.parametrize(("axis", "ends"), [(0, ("309", "step 412")), (2, ("17 min", "22 min"))])
async def test_zoom_shows_the_newest_part(
    app_of: AppOf, settle: Settle, fleet: list[Run], axis: int, ends: tuple[str, str]
) -> None:
    app = app_of("compare")
    app.marked = fleet[:2]
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press(*"a" * axis, "z")
        chart = app.screen.query_one(LineChart)
        assert "newest 1/4" in chart.text
        foot = chart.text.splitlines()[-2].strip("│ ")
        assert (foot[: len(ends[0])], foot[-len(ends[1]) :]) == ends
        await pilot.press("z", "z")
        assert "newest" not in chart.text


async def test_a_live_run_grows(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("compare")
    app.marked = [fleet[0]]
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        with EventLog(fleet[0].events_path) as log:
            log.append(Step(1000, 0.6, 0.5432, 1e-4, 0.4, 1, 5000.0, 3.2, 1000))
        await pilot.pause(1.5)
        assert "step 1,000" in app.screen.query_one(LineChart).text


async def test_no_runs(app_of: AppOf, settle: Settle) -> None:
    app = app_of("compare")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("a", "m", "y")
        assert "Or make your own plan (1)" in app.screen.query_one(ComparisonTable).text


async def test_how_each_run_ended_is_said(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("compare")
    app.marked = [fleet[2], fleet[1], fleet[4]]
    async with app.run_test(size=(160, 40)) as pilot:
        await settle(pilot)
        await pilot.pause(0.6)
        (line,) = [line for line in app.screen.query_one(ComparisonTable).text.splitlines() if "state" in line]
        assert "✘ failed: oom, step 3/412" in line
        assert "✔ finished, step 412/412" in line
        assert "? lost, step 200/412" in line
