"""Notices on a small terminal: two are enough, and bad news outlasts the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from textual.notifications import Notification

from finetui.tui.app import FinetuiApp
from finetui.tui.notices import spare


def notice(text: str, at: float, severity: Any = "information") -> Notification:
    return Notification(text, severity=severity, raised_at=at)


def test_the_mildest_gives_way_first_and_the_newest_never() -> None:
    error, hint, warning, newest = (
        notice("error", 1, "error"), notice("hint", 2), notice("warning", 3, "warning"), notice("newest", 4)
    )  # fmt: skip
    all_four = [newest, warning, hint, error]
    assert spare(all_four, 24) == [hint, warning]
    assert spare(all_four, 30) == []
    assert spare([error, newest], 24) == []


def test_of_equals_the_oldest() -> None:
    notices = [notice(str(n), n) for n in range(6)]
    assert spare(notices, 40) == notices[:2]
    assert spare(notices, 24) == notices[:4]


async def test_on_the_screen(app_of: Callable[..., FinetuiApp], settle: Callable[[Any], Awaitable[None]]) -> None:
    from textual.widgets._toast import Toast

    app = app_of()
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(pilot)
        app.notify("it failed", severity="error", timeout=60)
        for number in range(3):
            app.notify(f"hint {number}", timeout=60)
        await settle(pilot)
        assert sorted(kept.message for kept in app._notifications) == ["hint 2", "it failed"]
        assert len(app.screen.query(Toast)) == 2
