"""What all screens share: pictures come whole, and what is drawn is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from textual._compositor import Compositor, LayoutUpdate
from textual.app import App
from textual.widgets import Input

from finetui.engine.run import Run
from finetui.planner.recipe import Recipe
from finetui.tui.app import FinetuiApp
from finetui.tui.screens.base import BaseScreen


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


async def test_what_has_moved_is_drawn_even_where_the_map_was_read_before_the_layout(
    app_of: Callable[..., FinetuiApp], settle: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_of("launch")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        screen, due = app.screen, set()
        draw, lay_out = Compositor.render_update, BaseScreen._refresh_layout

        def drawn(compositor: Compositor, **more: Any) -> Any:
            due.update(compositor._dirty_regions)
            return draw(compositor, **more)

        def laid_out(screen: BaseScreen, *sizes: Any, **more: Any) -> None:
            screen._compositor._full_map_invalidated = True  # as after a widget was added
            assert screen._compositor.full_map
            lay_out(screen, *sizes, **more)

        monkeypatch.setattr(Compositor, "render_update", drawn)
        monkeypatch.setattr(BaseScreen, "_refresh_layout", laid_out)
        before = screen.query_one("#command").region
        screen.query_one("#recipe").styles.height = 8  # what is above it goes up, as large as before
        await settle(pilot)
        now = screen.query_one("#command").region
        assert now == before.translate((0, -2))
        assert any(region.contains_region(now) for region in due), due


@pytest.mark.parametrize(("screen", "key"), [("plan", "o"), ("plan", "i"), ("plan", "s"), ("gpus", "w")])
@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "x" * 300])
async def test_what_can_not_be_a_path_is_told(
    app_of: Callable[..., FinetuiApp], settle: Callable[[Any], Any], screen: str, key: str, text: str
) -> None:
    app = app_of(screen, recipe=Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "lora"}))
    async with app.run_test(size=(130, 36)) as pilot:
        await settle(pilot)
        await pilot.press(key)
        await settle(pilot)
        app.screen.query_one(Input).value = text
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert ["can't be a path" in note.message for note in app._notifications] == [True]
