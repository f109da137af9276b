"""What all screens share: pictures come whole, and what is drawn is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from textual._compositor import LayoutUpdate
from textual.app import App

from finetui.engine.run import Run
from finetui.tui.app import FinetuiApp


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, int]]:
    """What was drawn, each with the number of batches open then: with any, Textual throws it away.

    The pause after a change of screens is long, as it is on a machine that has much else to do.
    """
    drawn: list[tuple[object, int]] = []
    pause = App.delay_update

    def display(app: App[None], screen: object, picture: object) -> None:
        if picture is not None:
            drawn.append((picture, app._batch_count))

    monkeypatch.setattr(App, "_display", display)
    monkeypatch.setattr(App, "delay_update", lambda app, delay=0.05: pause(app, 0.3))
    return drawn


async def test_the_first_picture_is_whole_and_none_is_thrown_away(
    app_of: Callable[..., FinetuiApp],
    fleet: list[Run],
    pictures: list[tuple[object, int]],
    settle: Callable[[Any], Any],
) -> None:
    app = app_of("monitor", fleet[0])
    async with app.run_test(size=(100, 30)) as pilot:
        for mode in ("monitor", "runs", "plan", "runs"):
            if mode != app.current_mode:
                pictures.clear()
                app.switch_mode(mode)
            await pilot.pause(0.35)
            await settle(pilot)
            assert isinstance(pictures[0][0], LayoutUpdate), f"{mode}: pieces of it came first"
            assert {batches for _, batches in pictures} == {0}, f"{mode}: drawn for nothing"
