"""The app as a whole: screens, help, palette, colours, ASCII, and how light it is to open."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Static

from finetui.engine.run import Run
from finetui.planner.errors import UserError
from finetui.tui.app import FinetuiApp, run_app
from finetui.tui.backend import Backend
from finetui.tui.keys import KEYS
from finetui.tui.screens.help import Help
from finetui.tui.widgets.bars import MODES, TopBar
from finetui.tui.widgets.memory_bar import MemoryBar

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


async def test_digits_go_through_the_screens(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        for key, mode, _ in (*MODES[1:], MODES[0], MODES[0]):
            await pilot.press(key)
            await settle(pilot)
            assert app.current_mode == mode


async def test_plan_shows_what_launch_has_planned(app_of: AppOf, settle: Settle) -> None:
    app = app_of("launch")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert app.plan is not None
        await pilot.press("1")
        await settle(pilot)
        assert "✔ fits" in app.screen.query_one(MemoryBar).text


async def test_help_lists_every_key(app_of: AppOf, settle: Settle) -> None:
    app = app_of()
    async with app.run_test(size=(120, 220)) as pilot:
        await settle(pilot)
        await pilot.press("question_mark")
        assert isinstance(app.screen, Help)
        text = app.export_screenshot().replace("&#160;", " ")
        listed = [key for key in KEYS if key.help.replace("'", "&#x27;") in text or key.help in text]
        assert listed == list(KEYS)
        await pilot.press("q")
        await pilot.pause()
        assert not isinstance(app.screen, Help)


async def test_the_palette_offers_every_key_of_the_screen(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        commands = {command.title: command.callback for command in app.get_system_commands(app.screen)}
        assert "monitor: Log scale" in commands
        assert "finetui: Quit" in commands
        commands["finetui: Runs: all runs of this machine"]()
        await settle(pilot)
        assert app.current_mode == "runs"


@pytest.mark.parametrize("mode", ["plan", "launch", "monitor", "runs"])
async def test_ascii_means_ascii(app_of: AppOf, settle: Settle, fleet: list[Run], mode: str) -> None:
    app = app_of(mode, fleet[0], ascii_only=True, theme="ansi-dark")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert app.export_screenshot().replace("\u00a0", " ").isascii()


@pytest.mark.parametrize("mode", ["plan", "launch", "monitor", "runs"])
async def test_sixteen_colours_use_no_other(app_of: AppOf, settle: Settle, fleet: list[Run], mode: str) -> None:
    app = app_of(mode, fleet[0], theme="ansi-dark")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        from rich.color import ColorType

        strips = app.screen._compositor.render_strips(app.size)
        styles = [segment.style for strip in strips for segment in strip if segment.style and segment.text.strip()]
        colours = {colour for style in styles for colour in (style.color, style.bgcolor) if colour is not None}
        assert {colour.type for colour in colours} <= {ColorType.DEFAULT, ColorType.STANDARD}, colours


async def test_no_color(app_of: AppOf, settle: Settle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = app_of(theme="ansi-dark")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert app.no_color
        assert app.is_running


@pytest.mark.parametrize("size", [(1, 1), (20, 5), (60, 18), (80, 24), (100, 30), (300, 90)])
@pytest.mark.parametrize("mode", ["plan", "launch", "monitor", "runs"])
async def test_any_size(app_of: AppOf, settle: Settle, fleet: list[Run], mode: str, size: tuple[int, int]) -> None:
    app = app_of(mode, fleet[0])
    async with app.run_test(size=size) as pilot:
        await pilot.pause(0.1)
        await pilot.resize_terminal(*reversed(size))
        await pilot.pause(0.1)
        assert app.is_running
        assert not app.query(Static).filter(".error")


def test_refuses_to_draw_on_what_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="terminal") as caught:
        run_app()
    assert "finetui plan" in caught.value.do


def test_opening_imports_nothing_heavy() -> None:
    code = (
        "import sys, finetui.tui.app, finetui.tui.screens.plan\n"
        "assert 'pydantic' not in sys.modules\n"
        "import finetui.tui.screens.monitor, finetui.tui.screens.launch, finetui.tui.screens.runs\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'peft', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    path = os.pathsep.join([str(Path(sys.modules["finetui"].__path__[0]).parent), *filter(None, sys.path)])
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize(("machine", "gpu"), [("CPU only", "RTX-4090"), ("1 × H100 SXM", None)])
async def test_what_is_planned_first_fits_the_machine(
    backend: Backend, settle: Settle, machine: str, gpu: str | None
) -> None:
    app = FinetuiApp(backend=replace(backend, machine=lambda: machine))
    async with app.run_test(size=(110, 30)) as pilot:
        await settle(pilot)
        assert app.recipe is not None
        assert app.recipe.hardware.gpu == gpu
        assert machine in app.screen.query_one(TopBar).text


async def test_a_recipe_that_was_given_is_left_alone(app_of: AppOf, backend: Backend, settle: Settle) -> None:
    app = app_of(backend=replace(backend, machine=lambda: "CPU only"))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert app.recipe is not None
        assert app.recipe.hardware.gpu is None
