"""Values read off the charts of Monitor and Compare, by keys and by the mouse."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from finetui.engine.run import Run
from finetui.tui.app import FinetuiApp
from finetui.tui.widgets.line_chart import LineChart

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


def chart(app: FinetuiApp, name: str) -> LineChart:
    return app.screen.query_one(f"#{name}", LineChart)


def heading(app: FinetuiApp, name: str) -> str:
    return chart(app, name).text.splitlines()[0]


async def test_all_charts_of_a_run_tell_one_step(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        latest = [heading(app, name) for name in ("loss", "rate", "grad-norm", "figure")]
        await pilot.press("left")
        assert heading(app, "loss").startswith("╭─ loss at step 240 1.2238 mean 1.2212 held-out 1.3492 ")
        assert heading(app, "rate").startswith("╭─ tokens/s 5,184 ")
        await pilot.press("left_square_bracket", "left_square_bracket", "h")
        at = chart(app, "loss").at
        assert at is not None
        assert at < 200
        history = app.screen._history
        loss = next(bucket for bucket in history.loss.buckets if bucket.last == at)
        assert f"loss at step {at:.0f} {loss.end:.4f} mean" in heading(app, "loss")
        norm = next(bucket for bucket in history.grad_norm.buckets if bucket.last == at)
        assert f"grad norm {norm.end:.3g} " in heading(app, "grad-norm")
        assert "│" in chart(app, "rate").text.splitlines()[2].strip("│")  # where it is read
        await pilot.press("l")
        assert chart(app, "loss").at > at
        await pilot.press(*["right_square_bracket"] * 5)
        assert [heading(app, name) for name in ("loss", "rate", "grad-norm", "figure")] == latest


async def test_a_click_reads_and_a_second_one_ends_it(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        before = heading(app, "loss")
        width = chart(app, "rate").size.width
        await pilot.click(chart(app, "rate"), offset=(width // 2, 2))
        await pilot.pause()
        assert 100 < chart(app, "loss").at < 312
        assert "at step" in heading(app, "loss")
        await pilot.click(chart(app, "rate"), offset=(width // 2, 2))
        await pilot.pause()
        assert heading(app, "loss") == before


async def test_another_run_begins_at_its_newest(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press("left", "left")
        await pilot.press("n")
        await settle(pilot)
        assert chart(app, "loss").at is None


async def test_without_a_step_there_is_nothing_to_read(
    app_of: AppOf, settle: Settle, make_run: Callable[..., Run]
) -> None:
    app = app_of("monitor", make_run("none", []))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("left", "right", "pageup", "pagedown")
        await pilot.click(chart(app, "loss"), offset=(20, 3))
        assert chart(app, "loss").at is None
        assert "no steps yet" in chart(app, "loss").text


async def test_compared_runs_at_one_place(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("compare")
    app.marked = fleet[:2]
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        before = heading(app, "overlay")
        await pilot.press("left")
        assert heading(app, "overlay").startswith("╭─ loss at step 412 A 1.2238 B ")  # A has come to step 240
        await pilot.press("left_square_bracket", "h")
        assert chart(app, "overlay").at < 412
        assert " A 1." in heading(app, "overlay")
        assert " B 1." in heading(app, "overlay")
        await pilot.press("a")  # another axis has other places
        assert chart(app, "overlay").at is None
        await pilot.press("h")
        assert "M tokens A 1." in heading(app, "overlay")
        await pilot.press("l", "a", "a", "a")
        assert heading(app, "overlay") == before
