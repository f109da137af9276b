"""Help: every key there is, from the one table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from ..keys import SCOPES, keys_of, rebound

#: Scopes whose keys work inside a screen.
_INSIDE = {"plan": ("field", "terms"), "launch": ("field",), "settings": ("field",)}


class Help(ModalScreen[None]):
    """All keys by screen, the current screen's first."""

    BINDINGS = [  # noqa: RUF012
        ("escape,q,question_mark,f1,enter", "dismiss", "Close"),
        ("j", "scroll_by(1)", "Down"),
        ("k", "scroll_by(-1)", "Up"),
    ]

    def __init__(self, scope: str, own: Mapping[str, str]) -> None:
        super().__init__()
        self._scope, self._own = scope, own

    def compose(self) -> ComposeResult:
        """One table per scope."""
        first = [self._scope, *_INSIDE.get(self._scope, ())]
        order = [*(scope for scope in first if scope in SCOPES), *(scope for scope in SCOPES if scope not in first)]
        with VerticalScroll(id="dialog") as dialog:
            dialog.border_title = "keys"
            dialog.border_subtitle = "esc or q closes"
            for scope in order:
                table = Table.grid(padding=(0, 2))
                table.add_column(width=16, justify="right", no_wrap=True)
                table.add_column()
                for key in rebound(keys_of(scope), self._own):
                    table.add_row(Text(key.all_shown, style="bold"), key.help)
                yield Static(SCOPES[scope], classes="heading", markup=False)
                yield Static(table)

    def action_scroll_by(self, rows: int) -> None:
        """Scroll the list."""
        self.query_one(VerticalScroll).scroll_relative(y=rows * 2, animate=False)
