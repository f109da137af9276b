"""Told: some lines to read, and to copy, over the screen that they are about."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen

from ..widgets.text_block import TextBlock


class Told(ModalScreen[None]):
    """Lines of text in a box that scrolls; ``title`` says what they are about."""

    BINDINGS = [  # noqa: RUF012
        ("escape,q,enter", "dismiss", "Close"),
        ("y", "copy", "Copy"),
        ("j,down", "scroll_by(1)", "Down"),
        ("k,up", "scroll_by(-1)", "Up"),
    ]

    def __init__(self, title: str, lines: Sequence[str]) -> None:
        super().__init__()
        self._heading, self._text = title, "\n".join(lines)

    def compose(self) -> ComposeResult:
        """A box that scrolls."""
        with VerticalScroll(id="dialog") as dialog:
            dialog.border_title = escape(self._heading)
            dialog.border_subtitle = "y copies, esc or q closes"
            yield TextBlock(id="told")

    def on_mount(self) -> None:
        """Show the lines."""
        self.query_one(TextBlock).show(self._text)

    def action_copy(self) -> None:
        """Copy the lines."""
        self.app.copy_to_clipboard(self._text)
        self.notify("Copied, if this terminal lets programs do that (OSC 52).", timeout=3)

    def action_scroll_by(self, rows: int) -> None:
        """Scroll."""
        self.query_one(VerticalScroll).scroll_relative(y=rows * 2, animate=False)
