"""Logs: every rank's, as they grow, and nothing in them reaches the terminal as a command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from finetui.engine.run import Run
from finetui.tests.bench.long_run import lines
from finetui.tui.app import FinetuiApp
from finetui.tui.keys import key_of
from finetui.tui.widgets.log_view import KEPT, LogView, clean

AppOf = Callable[..., FinetuiApp]
Settle = Callable[[Any], Awaitable[None]]


@pytest.fixture
def logged(fleet: list[Run]) -> Run:
    """The newest run, with the logs of two ranks."""
    folder = fleet[0].path / "log"
    folder.mkdir(exist_ok=True)
    (folder / "rank0.log").write_text("".join(f"line {n}\n" for n in range(1, 201)), encoding="utf-8")
    (folder / "rank1.log").write_text("rank one\x1b]0;owned\x07 says \x1b[31mred\x1b[0m\n", encoding="utf-8")
    return fleet[0]


def text(app: FinetuiApp) -> str:
    return app.screen.query_one(LogView).text


async def test_the_end_is_followed_until_one_goes_up(app_of: AppOf, settle: Settle, logged: Run) -> None:
    app = app_of("logs", logged)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "line 200" in text(app)
        with open(logged.path / "log" / "rank0.log", "a", encoding="utf-8") as file:
            file.write("line 201\nhalf a li")
        await pilot.pause(0.6)
        assert "line 201" in text(app)
        assert "half" not in text(app)
        await pilot.press("pageup")
        assert "line 201" not in text(app)
        assert "following" not in text(app)
        await pilot.press("g")
        assert text(app).splitlines()[1].startswith("│ line 1 ")
        await pilot.press("G")
        assert "line 201" in text(app)
        assert "following" in text(app)
        await pilot.press("f", "k")
        assert "following" not in text(app)


async def test_each_rank_and_the_events(app_of: AppOf, settle: Settle, logged: Run) -> None:
    app = app_of("logs", logged)
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press("r")
        await pilot.pause(0.6)
        assert "rank1.log" in text(app)
        assert "rank one says red" in text(app)
        await pilot.press("r")
        await pilot.pause(0.6)
        assert ": events" in text(app)
        assert "step 240" in text(app)
        await pilot.press("r")
        await pilot.pause(0.6)
        assert "line 200" in text(app)


async def test_searching(app_of: AppOf, settle: Settle, logged: Run) -> None:
    app = app_of("logs", logged)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("slash", *"LINE 5", "enter")
        await settle(pilot)
        first = text(app).splitlines()[1]
        assert "line 59" in first
        await pilot.press("N")
        assert "line 58" in text(app).splitlines()[1]
        await pilot.press("n")
        assert text(app).splitlines()[1] == first
        await pilot.press("slash", *"nowhere", "enter")
        await settle(pilot)
        assert text(app).splitlines()[1] == first


async def test_from_runs_to_the_logs_of_that_run(app_of: AppOf, settle: Settle, logged: Run, fleet: list[Run]) -> None:
    app = app_of("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("j", "l")
        await settle(pilot)
        assert app.current_mode == "logs"
        assert fleet[1].name in text(app)
        await pilot.press(key_of("runs"), "k", "l")
        await pilot.pause(0.6)
        assert "line 200" in text(app)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("10%\r50%\r100%\n", "100%"),
        ("a\x1b[2J\x1b[Hb", "ab"),
        ("title \x1b]0;x\x1b\\ end", "title  end"),
        ("\x9b31mred\x07\x00", "31mred"),
        ("tab\tstop", "tab stop"),
    ],
)
def test_a_log_gives_the_terminal_no_orders(raw: str, shown: str) -> None:
    assert clean(raw) == shown


def test_a_long_log_keeps_its_end() -> None:
    view = LogView()
    view.add(str(n) for n in range(KEPT + 5))
    assert view.find(-1) is False
    view.wanted = "20004"
    assert view.find(-1)
    assert not view.following


async def test_the_events_of_a_long_run_begin_near_their_end(app_of: AppOf, settle: Settle, logged: Run) -> None:
    made, about = lines(14_000, 1, 1000.0)
    logged.events_path.write_text("\n".join(made) + "\n", encoding="utf-8")
    app = app_of("logs", logged)
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press("r", "r")
        for _ in range(100):
            await pilot.pause(0.1)
            if f"step {about.steps} " in text(app):
                break
        assert f"step {about.steps} " in text(app)
        await pilot.press("g")
        assert "events before are left out" in text(app).splitlines()[1]


async def test_without_a_run_it_says_how_to_get_one(app_of: AppOf, settle: Settle) -> None:
    app = app_of("logs")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "no runs yet. b sets up a first one" in text(app)
        assert f"plan ({key_of('plan')}) and launch it ({key_of('launch')})" in " ".join(text(app).split())


async def test_a_log_that_is_empty_says_so(app_of: AppOf, settle: Settle, logged: Run) -> None:
    (logged.path / "log" / "rank0.log").write_text("")
    app = app_of("logs", logged)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        for _ in range(50):
            await pilot.pause(0.05)
            if "nothing was printed yet" in text(app):
                break
        assert "nothing was printed yet" in text(app)
