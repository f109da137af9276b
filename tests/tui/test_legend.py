"""The legend: no sign that a screen draws goes without a meaning, and help shows it where one asks for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from textual.containers import VerticalScroll

from finetui.engine.run import Run
from finetui.tui.app import FinetuiApp
from finetui.tui.charset import to_ascii
from finetui.tui.format import CHECK_GLYPHS, STATE_GLYPHS
from finetui.tui.keys import SCOPES
from finetui.tui.legend import LEGEND
from finetui.tui.widgets.line_chart import MARKS


def signs(scope: str) -> set[str]:
    return {word for sign, _ in LEGEND[scope] for word in sign.split()}


def test_every_mark_of_a_chart_has_a_meaning() -> None:
    assert {glyph for glyph, _ in MARKS.values()} <= signs("monitor")
    assert set(CHECK_GLYPHS.values()) <= signs("launch")


def test_every_state_has_a_meaning() -> None:
    assert {glyph for glyph, _ in STATE_GLYPHS.values()} == signs("runs")


def test_every_sign_has_a_likeness_in_ascii() -> None:
    lost = STATE_GLYPHS["lost"][0]
    said = [text for rows in LEGEND.values() for row in rows for text in row if text != lost]
    assert [text for text in said if to_ascii(text).count("?") > text.count("?")] == []


@pytest.mark.parametrize("scope", LEGEND)
async def test_help_explains_the_screen_in_front(
    app_of: Callable[..., FinetuiApp],
    settle: Callable[[Any], Awaitable[None]],
    fleet: list[Run],
    scope: str,
) -> None:
    app = app_of(scope, fleet[0])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("question_mark")
        await pilot.pause()
        dialog = app.screen.query_one(VerticalScroll)
        shown = [str(child.render()) for child in dialog.query(".heading")]
        assert shown[0] == SCOPES[scope]
        assert shown.index(f"Signs and words of {SCOPES[scope]}") < shown.index(SCOPES["app"])
        assert dialog.virtual_size.width <= dialog.size.width, "a line is cut off"
