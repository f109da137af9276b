"""Lines: what is drawn fits the size a widget has, however it came to it."""

from __future__ import annotations

import pytest
from textual.app import App, ComposeResult
from textual.containers import VerticalScroll

from finetui.tui.widgets.lines import Line, Lines


class Counted(Lines):
    """As many lines as it was told."""

    DEFAULT_CSS = "Counted { height: auto; }"
    count = 1

    def draw(self, width: int, height: int) -> list[Line]:
        return [[(f"line {number}", "")] for number in range(1, self.count + 1)]

    def show(self, count: int) -> None:
        self.count = count
        self.refresh(layout=True)
        self.redraw()


class Host(App[None]):
    """The widget alone, in a panel that scrolls."""

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Counted()


@pytest.mark.parametrize("looked_at", [False, True], ids=["laid out", "laid out by a look at the map"])
async def test_a_widget_that_grows_draws_all_its_lines(looked_at: bool) -> None:
    app = Host()
    async with app.run_test(size=(30, 10)) as pilot:
        await pilot.pause()
        widget, compositor = app.query_one(Counted), app.screen._compositor
        widget.show(5)
        if looked_at:  # as a mouse that moves does, or the focus: then no widget is told of its new size
            app.query_one(VerticalScroll)._clear_arrangement_cache()
            compositor._full_map_invalidated = True
            assert compositor.full_map[widget].region.height == 5
        await pilot.pause()
        shown = ["".join(segment.text for segment in strip).rstrip() for strip in compositor.render_strips(app.size)]
        assert [line for line in shown if line.startswith("line")] == [f"line {number}" for number in range(1, 6)]
