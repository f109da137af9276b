"""Settings: every change is kept at once and takes effect; what can't be is refused with the reason."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from finetui.planner import preferences
from finetui.tui import format  # noqa: A004
from finetui.tui.app import FinetuiApp
from finetui.tui.themes import NAMES
from finetui.tui.widgets.bars import KeyBar
from finetui.tui.widgets.field import Field
from finetui.tui.widgets.memory_bar import MemoryBar
from finetui.tui.widgets.text_block import TextBlock

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield preferences.settings_path()
    format.use_memory_unit("GiB")


def field(app: FinetuiApp, name: str) -> Field:
    return app.screen.query_one(f"#field-{name}", Field)


async def test_an_arrow_changes_the_theme_and_keeps_it(app_of: AppOf, settle: Settle, config: Path) -> None:
    app = app_of("settings")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        for name in preferences.THEMES[1:]:
            await pilot.press("right")
            await settle(pilot)
            assert app.theme == NAMES[name]
            assert preferences.load().theme == name
        await pilot.press("a")
        await settle(pilot)
        assert app.theme == "finetui"
        assert preferences.load().theme == "auto"
        assert "a Default" in app.screen.query_one(KeyBar).text


async def test_units_change_every_screen(app_of: AppOf, settle: Settle) -> None:
    app = app_of("settings")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        field(app, "memory_unit").focus()
        await pilot.press("right", "1")
        await settle(pilot)
        assert "10.9 of 85.0 GB" in app.screen.query_one(MemoryBar).text


async def test_a_key_is_chosen_and_a_clash_refused(app_of: AppOf, settle: Settle) -> None:
    app = app_of("settings")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        for key in ("o", "S"):
            field(app, "keys").focus()
            await pilot.press("enter", *"plan.save", "enter")
            await settle(pilot)
            assert app.screen.query_one(Input).value == ""
            await pilot.press(key, "enter")
            await settle(pilot)
            assert app.own_keys == ({} if key == "o" else {"plan.save": "S"})
        assert "S  plan.save" in app.screen.query_one("#about-text", TextBlock).text
        field(app, "keys").focus()
        await pilot.press("a")
        await settle(pilot)
        assert app.own_keys == {}


async def test_typed_values_and_the_wrong_ones(app_of: AppOf, settle: Settle) -> None:
    app = app_of("settings")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        for text, kept in (("3", 3.0), ("77", 3.0), ("often", 3.0)):
            field(app, "refresh_hz").focus()
            await pilot.press("enter", *text, "enter")
            await settle(pilot)
            assert preferences.load().refresh_hz == kept


async def test_what_is_wrong_with_the_file_is_said(app_of: AppOf, settle: Settle, config: Path) -> None:
    config.parent.mkdir(parents=True)
    config.write_text("thme: light\nkeys: {plan.save: o}\nmemory_unit: GB\n")
    app = app_of("settings")
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        told = " ".join(app.screen.query_one("#about-text", TextBlock).text.split())
        assert "Did you mean 'theme'?" in told
        assert "o would be both plan.save and plan.open" in told
        assert app.preferences.memory_unit == "GB"
        config.write_text("theme: light\n")
        await pilot.press("r")
        await settle(pilot)
        assert app.theme == "finetui-light"
        assert "!" not in app.screen.query_one("#about-text", TextBlock).text
        await pilot.press("y")
        await settle(pilot)
        assert app.clipboard == str(config)
