"""Pictures of each screen. After a wanted change: pytest tests/tui/test_snapshots.py --snapshot-update, then look."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from finetui.engine.run import Run
from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.widgets.log_view import LogView

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]
SIZES = [(80, 24), (100, 30)]


@pytest.fixture(autouse=True)
def _steady_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Input, "_toggle_cursor", lambda self: None)


def pressing(settle: Settle, *keys: str) -> Callable[[Any], Awaitable[None]]:
    """Waits for the first picture, then presses keys one by one; what threads still read is waited for at the end."""

    async def run_before(pilot: Any) -> None:
        await settle(pilot)
        for key in keys:
            await pilot.press(key)
            await settle(pilot)
        for view in pilot.app.screen.query(LogView):
            for _ in range(50):  # a run that has nothing to say is waited for in vain
                if "nothing yet" not in view.title(80)[1][0]:
                    break
                await pilot.pause(0.1)
        await still(pilot)

    return run_before


async def still(pilot: Any) -> None:
    """Wait until the picture has not changed for longer than the longest pause between two looks at a file."""
    before, same = "", 0
    while same < 4:
        await pilot.pause(0.1)
        now = pilot.app.export_screenshot()
        before, same = now, same + 1 if now == before else 0


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("mode", ["plan", "gpus", "data", "launch", "monitor", "runs", "compare", "settings"])
def test_screen(
    snap_compare: Any, app_of: AppOf, settle: Settle, fleet: list[Run], mode: str, size: tuple[int, int]
) -> None:
    assert snap_compare(app_of(mode, fleet[0]), terminal_size=size, run_before=pressing(settle))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_plan_that_does_not_fit(snap_compare: Any, app_of: AppOf, settle: Settle, size: tuple[int, int]) -> None:
    recipe = Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "full", "hardware": {"gpu": "T4"}})
    assert snap_compare(app_of(recipe=recipe), terminal_size=size, run_before=pressing(settle))


def test_a_model_that_is_being_chosen(snap_compare: Any, app_of: AppOf, settle: Settle) -> None:
    assert snap_compare(app_of(), terminal_size=(80, 24), run_before=pressing(settle, "enter"))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_models_of_a_gpu(snap_compare: Any, app_of: AppOf, settle: Settle, size: tuple[int, int]) -> None:
    recipe = Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "lora", "hardware": {"gpu": "RTX 4090"}})
    assert snap_compare(app_of(recipe=recipe), terminal_size=size, run_before=pressing(settle, "b", "f", "j"))


def test_curves_that_are_read_off(snap_compare: Any, app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    keys = ("left", "left_square_bracket", "left_square_bracket")
    assert snap_compare(app_of("monitor", fleet[0]), terminal_size=(100, 30), run_before=pressing(settle, *keys))


def test_a_file_of_another_tool(snap_compare: Any, app_of: AppOf, settle: Settle, tmp_path: Path) -> None:
    file = tmp_path / "lora.yml"
    file.write_text(
        "base_model: Qwen/Qwen3-8B\nadapter: lora\nlora_r: 8\nmicro_batch_size: 2\nsequence_len: 1024\n"
        "datasets: [{path: org/rows, type: alpaca}]\nwandb_project: mine\ngradient_checkpoint: true\n"
    )

    async def run_before(pilot: Any) -> None:
        await pressing(settle, "i")(pilot)
        pilot.app.screen.query_one(Input).value = str(file)
        await pressing(settle, "enter")(pilot)

    assert snap_compare(app_of(), terminal_size=(80, 24), run_before=run_before)


def test_help(snap_compare: Any, app_of: AppOf, settle: Settle) -> None:
    assert snap_compare(app_of(), terminal_size=(80, 24), run_before=pressing(settle, "question_mark"))


def test_a_run_that_failed(snap_compare: Any, app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[2])
    assert snap_compare(app, terminal_size=(80, 24), run_before=pressing(settle))


def test_eight_gpus_and_losses_that_are_not_finite(
    snap_compare: Any, app_of: AppOf, settle: Settle, make_run: Callable[..., Run], training: Any, now: float
) -> None:
    run = make_run("eight", training(begin=now - 783, gpus=8, nan_at=(100, 101, 102)), created=now - 783)
    assert snap_compare(app_of("monitor", run), terminal_size=(80, 24), run_before=pressing(settle, "y"))


def test_sixteen_colours(snap_compare: Any, app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0], theme="ansi-dark")
    assert snap_compare(app, terminal_size=(80, 24), run_before=pressing(settle))


def test_ascii(snap_compare: Any, app_of: AppOf, settle: Settle) -> None:
    app = app_of(ascii_only=True, theme="ansi-dark")
    assert snap_compare(app, terminal_size=(80, 24), run_before=pressing(settle))


def test_a_tiny_terminal(snap_compare: Any, app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    assert snap_compare(app_of("monitor", fleet[0]), terminal_size=(50, 10), run_before=pressing(settle))
