"""Help: every key there is, from the one table, and what the screen in front says in signs and short words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from ..keys import SCOPES, keys_of, rebound
from ..legend import LEGEND

#: Scopes whose keys work inside a screen.
_INSIDE = {"plan": ("field", "terms"), "launch": ("field",), "settings": ("field",)}


class Help(ModalScreen[None]):
    """The current screen's keys and legend, then the keys of all others."""

    BINDINGS = [  # noqa: RUF012
        ("escape,q,question_mark,f1,enter", "dismiss", "Close"),
        ("j", "scroll_by(1)", "Down"),
        ("k", "scroll_by(-1)", "Up"),
    ]

    def __init__(self, scope: str, own: Mapping[str, str]) -> None:
        super().__init__()
        self._scope, self._own = scope, own

    def compose(self) -> ComposeResult:
        """One table per scope, and the legend after the current screen's."""
        first = [self._scope, *_INSIDE.get(self._scope, ())]
        order = [*(scope for scope in first if scope in SCOPES), *(scope for scope in SCOPES if scope not in first)]
        with VerticalScroll(id="dialog") as dialog:
            dialog.border_title = "keys"
            dialog.border_subtitle = "j k scroll, esc or q closes"
            for scope in order:
                keys = rebound(keys_of(scope), self._own)
                yield from _listed(SCOPES[scope], [(key.all_shown, key.help) for key in keys])
                if scope == first[-1]:
                    yield from _listed(f"Signs and words of {SCOPES[self._scope]}", LEGEND.get(self._scope, ()))

    def action_scroll_by(self, rows: int) -> None:
        """Scroll the list."""
        self.query_one(VerticalScroll).scroll_relative(y=rows * 2, animate=False)


def _listed(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[Static]:
    """A heading and a table of two columns; nothing without rows."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=16, justify="right", no_wrap=True)
    table.add_column()
    for sign, meaning in rows:
        table.add_row(Text(sign, style="bold"), Text(meaning))
    if table.row_count:
        yield Static(title, classes="heading", markup=False)
        yield Static(table)
