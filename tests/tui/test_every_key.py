"""Every key of the table, pressed in the real app on its screen, reaches what it is for, and nothing swallows it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from textual.widgets import DataTable

from finetui.engine.run import Run
from finetui.tui.app import FinetuiApp
from finetui.tui.keys import SCOPES, Key, key_map, keys_of

from .test_keys import OWNERS

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]

#: Where a scope listens that is no screen, and what has to have the focus there.
WITHIN = {"app": ("plan", ""), "field": ("plan", "#field-tuning-rank"), "terms": ("plan", "MemoryBar")}
#: Keys that a table of Textual's takes before the screen's own row of the same meaning does.
BY_TABLE = {("gpus", "enter"), ("runs", "enter")} | {(s, key) for s in ("gpus", "runs") for key in ("up", "down")}


def parsed(row: Key) -> tuple[type, str, tuple[Any, ...]]:
    """Who acts, the method, and its arguments."""
    name, _, argument = row.action.partition("(")
    value = argument.rstrip(")")
    arguments = () if not value else (value.strip("'"),) if value.startswith("'") else (int(value),)
    owner = FinetuiApp if name.startswith("app.") else OWNERS[row.scope]
    return owner, f"action_{name.removeprefix('app.')}", arguments


async def open_on(app: FinetuiApp, pilot: Any, settle: Settle, focus: str) -> None:
    await settle(pilot)
    if focus:
        app.screen.query_one(focus).focus()
        await pilot.pause()


@pytest.mark.parametrize("scope", SCOPES)
async def test_every_key_reaches_its_action(
    app_of: AppOf, settle: Settle, fleet: list[Run], monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    mode, focus = WITHIN.get(scope, (scope, ""))
    app = app_of(mode, fleet[0])
    reached: list[tuple[str, tuple[Any, ...]]] = []
    wrong = []
    async with app.run_test(size=(100, 30)) as pilot:
        await open_on(app, pilot, settle, focus)
        for row in keys_of(scope):
            owner, method, arguments = parsed(row)
            for key in row.keys.split(","):
                if (scope, key) in BY_TABLE:
                    continue
                with monkeypatch.context() as patch:
                    patch.setattr(owner, method, lambda self, *a, method=method: reached.append((method, a)))
                    await pilot.press(key)
                    await pilot.pause()
                if reached != [(method, arguments)]:
                    wrong.append((row.id, key, list(reached)))
                reached.clear()
    assert not wrong


@pytest.mark.parametrize(("mode", "there"), [("gpus", "plan"), ("runs", "monitor")])
async def test_tables_take_arrows_and_enter(
    app_of: AppOf, settle: Settle, fleet: list[Run], mode: str, there: str
) -> None:
    app = app_of(mode, fleet[0])
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        table = app.screen.query_one(DataTable)
        at = table.cursor_row
        await pilot.press("down", "down", "up")
        assert table.cursor_row == at + 1
        await pilot.press("enter")
        await settle(pilot)
        assert app.current_mode == there


async def test_a_key_of_ones_own_does_it_and_the_old_one_no_more(
    app_of: AppOf, settle: Settle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetui.planner.preferences import Preferences
    from finetui.tui.screens.plan import PlanScreen
    from finetui.tui.widgets.bars import KeyBar, TopBar

    saved: list[int] = []
    monkeypatch.setattr(PlanScreen, "action_save", lambda self: saved.append(1))
    app = app_of(preferences=Preferences(keys={"plan.save": "S", "app.mode.gpus": "ctrl+g"}))
    async with app.run_test(size=(110, 30)) as pilot:
        await settle(pilot)
        await pilot.press("s")
        await pilot.pause()
        assert saved == []
        await pilot.press("S")
        await pilot.pause()
        assert saved == [1]
        assert "S Save" in app.screen.query_one(KeyBar).text
        assert "^g GPUs" in app.screen.query_one(TopBar).text
        titles = {command.title: command.help for command in app.get_system_commands(app.screen)}
        assert titles["plan: Save"].endswith("(S)")
        await pilot.press("ctrl+g")
        await settle(pilot)
        assert app.current_mode == "gpus"


@pytest.mark.parametrize(
    ("own", "kept", "problem"),
    [
        ({"plan.save": "S"}, {"plan.save": "S"}, ""),
        ({"plan.save": "/, F5"}, {"plan.save": "slash,f5"}, ""),
        ({"plan.save": "o", "plan.open": "s"}, {"plan.save": "o", "plan.open": "s"}, ""),
        ({"plan.save": "o"}, {}, "o would be both plan.save and plan.open"),
        ({"plan.save": "l"}, {}, "l would be both plan.save and field.step.1"),
        ({"plan.save": "1"}, {}, "1 would be both plan.save and app.mode.plan"),
        ({"app.leave": "x"}, {}, "x would be both app.leave and monitor.stop"),
        ({"plan.save": "^b"}, {}, "never arrives"),
        ({"plan.save": "alt+s"}, {}, "never arrives"),
        ({"plan.save": "nokey"}, {}, "'nokey' is no key"),
        ({"plan.svae": "S", "plan.open": "O"}, {"plan.open": "O"}, "Did you mean 'plan.save'?"),
    ],
)
def test_a_table_of_ones_own(own: dict[str, str], kept: dict[str, str], problem: str) -> None:
    chosen, problems = key_map(own)
    assert chosen == kept
    assert problem in " ".join(problems)
    assert bool(problem) == bool(problems)


async def test_a_click_on_a_bar_presses_its_key(app_of: AppOf, settle: Settle, fleet: list[Run]) -> None:
    from finetui.tui.widgets.bars import Bar, KeyBar, TopBar

    app = app_of("plan", fleet[0])

    async def click(bar: type[Bar], words: str) -> None:
        at = app.screen.query_one(bar).text.index(words)
        await pilot.click(bar, offset=(at + 1, 0))
        await settle(pilot)

    async with app.run_test(size=(110, 30)) as pilot:
        await settle(pilot)
        for words, mode in (("Runs", "runs"), ("finetui", "runs"), ("8 Logs", "logs"), ("1 × H100", "logs")):
            await click(TopBar, words)
            assert app.current_mode == mode
        await click(TopBar, "GPUs")
        before = str(app.screen.query_one(DataTable).border_title)
        await click(KeyBar, "Sort")
        assert str(app.screen.query_one(DataTable).border_title) != before
        await click(KeyBar, "Help")
        assert len(app.screen_stack) == 2
