"""TermList: terms of a plan as formulas with their numbers. As high as needed: put it into something that scrolls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..term_view import amount, rows
from .lines import Line, Lines, spread, wrapped

if TYPE_CHECKING:
    from ...planner.terms import Term


class TermList(Lines):
    """Each term: its amount, its formula, then its parts, what each is on the left and how much on the right."""

    def __init__(self) -> None:
        super().__init__()
        self._terms: Sequence[Term] = ()
        self._words: tuple[str, str] = ("reckoning…", "dim")

    def show(self, terms: Sequence[Term], words: str = "", role: str = "dim") -> None:
        """Draw terms; without any, ``words`` say why."""
        self._terms, self._words = terms, (words, role)
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if not self._terms:
            return wrapped(self._words[0], width, self._words[1])
        lines: list[Line] = []
        for number, term in enumerate(self._terms):
            lines += [[]] if number else []
            lines.append(spread([(term.name, "accent")], [(amount(term), "bold")], width))
            lines += wrapped(term.formula, width)
            for what, how, figure in rows(term):
                last = what == "together"
                lines.append(spread([(f"  {what}", "bold" if last else "")], [(figure, "bold" if last else "")], width))
                lines += wrapped(f"    {how}", max(width - 10, 20), "dim", indent="    ") if how else []
            if term.source:
                lines += wrapped(f"source: {term.source}", width, "dim")
        return lines
