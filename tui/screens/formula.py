"""Formula: how a figure of the plan was reckoned, over the screen that shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from textual import work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen

from ...planner.errors import FinetuiError
from ..widgets.term_list import TermList

if TYPE_CHECKING:
    from ...planner.terms import Term


class Formula(ModalScreen[None]):
    """The formula of one figure, with its numbers in it; that of a step's time with all that it is made of.

    Args:
        name: the term's name in the answer of ``explain``, which may take a while and is asked in a thread.
        basis: what the plan rests on, for the foot of the box.
    """

    BINDINGS = [  # noqa: RUF012
        ("escape,q,enter", "dismiss", "Close"),
        ("j,down", "scroll_by(1)", "Down"),
        ("k,up", "scroll_by(-1)", "Up"),
    ]

    def __init__(self, name: str, basis: str, explain: Callable[[], Mapping[str, Term]]) -> None:
        super().__init__()
        self._wanted, self._basis, self._explain = name, basis, explain

    def compose(self) -> ComposeResult:
        """A box that scrolls."""
        with VerticalScroll(id="dialog") as dialog:
            dialog.border_title = "how this is reckoned"
            dialog.border_subtitle = f"by {self._basis}, esc or q closes"
            yield TermList()

    def on_mount(self) -> None:
        """Ask."""
        self._ask()

    @work(thread=True, exclusive=True, exit_on_error=False)
    def _ask(self) -> None:
        try:
            terms, why = self._explain(), ""
        except FinetuiError as error:
            terms, why = {}, str(error)
        self.app.call_later(self._show, terms, why)

    def _show(self, terms: Mapping[str, Term], why: str) -> None:
        if not self.is_attached:  # closed meanwhile
            return
        names = [self._wanted]
        if self._wanted == "speed":
            parts = sorted((term for term in terms.values() if term.kind == "speed"), key=lambda term: -term.amount)
            names += [term.name for term in parts if term.name != "speed" and term.amount > 0]
        found = [terms[name] for name in names if name in terms]
        self.query_one(TermList).show(found, why or f"there is no formula for {self._wanted}", "bad" if why else "dim")

    def action_scroll_by(self, rows: int) -> None:
        """Scroll."""
        self.query_one(VerticalScroll).scroll_relative(y=rows * 2, animate=False)
