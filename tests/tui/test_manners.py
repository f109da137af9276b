"""Manners on terminals of every kind: a likeness in ASCII for all that is drawn, and nothing said by colour alone."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.style import Style
from textual.widgets import DataTable

from finetui.engine.run import Run
from finetui.tests.bench.terminal import environment
from finetui.tui.app import FinetuiApp
from finetui.tui.charset import to_ascii
from finetui.tui.keys import key_of
from finetui.tui.screens.help import Help
from finetui.tui.widgets.bars import TopBar
from finetui.tui.widgets.gpu_panel import gpu_cell, gpu_row

TUI = Path(sys.modules["finetui"].__path__[0]) / "tui"


def drawn() -> Iterator[tuple[str, str]]:
    """Every character beyond ASCII in a text of the source that is no docstring, with its file and line."""
    for path in sorted(TUI.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        words = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in words:
                yield from ((character, f"{path.name}:{node.lineno}") for character in set(node.value) - ASCII)


ASCII = {chr(code) for code in range(128)}


def test_everything_that_is_drawn_has_a_likeness_in_ascii() -> None:
    found = [(character, where) for character, where in drawn() if not where.startswith("charset.py")]
    assert len(found) > 50, "the search finds nothing"
    assert [one for one in found if "?" in to_ascii(one[0]) and one[0] != "\ufffd"] == []


@pytest.mark.parametrize("verb", [["plan", "Qwen/Qwen3-8B", "--gpu", "RTX4090"], ["gpus"]], ids=" ".join)
def test_what_is_printed_has_one_too(tmp_path: Path, verb: list[str]) -> None:
    said = subprocess.run(
        [sys.executable, "-P", "-m", "finetui", *verb],
        env=environment(tmp_path, PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "UnicodeEncodeError" not in said.stderr
    assert (said.stdout + said.stderr).isascii()
    assert said.returncode == 0


async def test_two_keys_that_close_a_dialog_close_one(app_of: Callable[..., FinetuiApp]) -> None:
    async with app_of().run_test(size=(100, 30)) as pilot:
        await pilot.app.push_screen(Help("plan", {}))
        dialog = pilot.app.screen
        dialog.dismiss()
        dialog.dismiss()
        await pilot.pause()
        assert len(pilot.app.screen_stack) == 1
        await pilot.press(key_of("runs"))
        assert pilot.app.current_mode == "runs"


async def test_the_focus_comes_back_after_a_moment_without_room(
    app_of: Callable[..., FinetuiApp], settle: Callable[[Any], Awaitable[None]]
) -> None:
    async with app_of().run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        await pilot.press("down", "down")
        focused = pilot.app.focused
        assert focused is not None
        await pilot.resize_terminal(20, 5)
        await pilot.resize_terminal(100, 30)
        await settle(pilot)
        assert pilot.app.focused is focused


async def test_rules_are_parsed_again_for_another_theme_alone(app_of: Callable[..., FinetuiApp]) -> None:
    """Textual would parse them anew on every refresh."""
    async with app_of().run_test(size=(100, 30)) as pilot:
        app = pilot.app
        rules, accent = app.stylesheet.rules, app.screen.query_one(TopBar)._style("accent", Style())
        app.refresh_css()
        assert app.stylesheet.rules is rules
        app.theme = "textual-light"
        await pilot.pause()
        assert app.stylesheet.rules is not rules
        assert app.screen.query_one(TopBar)._style("accent", Style()) != accent


def test_heat_is_marked_without_colour_too(gpu_sample: Callable[..., Any]) -> None:
    cool, hot = (dataclasses.asdict(gpu_sample(0, temperature_c=degrees)) for degrees in (67.0, 91.0))
    for draw in (gpu_row, gpu_cell):
        told = ["".join(text for text, _ in draw(gpu, 0.0, 90)) for gpu in (cool, hot)]
        assert "!" not in told[0]
        assert "!91 °C" in told[1]
        assert len(told[0]) == len(told[1])


async def test_without_colour_every_state_is_still_a_word(
    app_of: Callable[..., FinetuiApp], settle: Callable[[Any], Awaitable[None]], fleet: list[Run]
) -> None:
    """What is green, amber or red is also a glyph, a word or a figure."""
    async with app_of("runs", fleet[0]).run_test(size=(120, 30)) as pilot:
        await settle(pilot)
        shown = pilot.app.export_screenshot(simplify=True).replace("&#160;", " ")
    for words in ("● running", "✔ finished", "✘ failed", "? lost"):
        assert words in shown


@pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux on this machine")
@pytest.mark.parametrize(("locale", "glyph"), [("C.UTF-8", "╭─"), ("", "+-")], ids=["utf-8", "no locale"])
def test_in_tmux(tmp_path: Path, locale: str, glyph: str) -> None:
    """A detached session that is drawn, detached from, resized and typed into; without a locale tmux shows ASCII."""
    environ = environment(tmp_path, LANG=locale, TERM="xterm-256color", TMUX_TMPDIR=str(tmp_path))

    def tmux(*words: str) -> str:
        said = subprocess.run(
            ["tmux", "-f", "/dev/null", *words], env=environ, capture_output=True, text=True, timeout=30
        )
        return said.stdout

    def shows(*words: str) -> str:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if all(word in (picture := tmux("capture-pane", "-p", "-t", "t")) for word in words):
                return picture
            time.sleep(0.2)
        raise AssertionError(f"{words} not in:\n{picture}")

    tmux("new-session", "-d", "-s", "t", "-x", "100", "-y", "30", f"{sys.executable} -P -m finetui; sleep 60")
    try:
        picture = shows("verdict", "fits", glyph)
        assert "_" not in picture, "tmux writes _ for what it can't show"
        tmux("resize-window", "-t", "t", "-x", "80", "-y", "24")
        tmux("send-keys", "-t", "t", key_of("runs"))
        shows("held-out")
        tmux("send-keys", "-t", "t", "q")
        end = time.monotonic() + 10
        while "held-out" in tmux("capture-pane", "-p", "-t", "t") and time.monotonic() < end:
            time.sleep(0.1)
        assert "held-out" not in tmux("capture-pane", "-p", "-t", "t")
    finally:
        tmux("kill-server")


@pytest.mark.parametrize("mode", ["runs", "gpus"])
async def test_the_cursor_stays_where_it_is_when_the_terminal_is_resized(
    app_of: Callable[..., FinetuiApp], settle: Callable[[Any], Awaitable[None]], fleet: list[Run], mode: str
) -> None:
    async with app_of(mode, fleet[0]).run_test(size=(140, 30)) as pilot:
        await settle(pilot)
        await pilot.press("down", "down")
        await pilot.resize_terminal(62, 20)
        await settle(pilot)
        assert pilot.app.screen.query_one(DataTable).cursor_row == 2
