"""OffersCompared: the marked offers side by side, over the GPUs screen; the best figure of each line stands out."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen

from ..offers import OfferRow, compared
from ..widgets.lines import Line, Lines, fitted

_LABEL = 14


class OfferColumns(Lines):
    """A column for each offer, as many as there is room for."""

    def __init__(self, rows: Sequence[OfferRow], now: float) -> None:
        super().__init__()
        self._rows, self._now = rows, now

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        room = max((width - _LABEL) // 18, 1)
        rows = self._rows[:room]
        each = max((width - _LABEL) // len(rows), 4)
        names = [f"{row.count} × {row.gpu}" for row in rows]
        lines: list[Line] = [[(" " * _LABEL, "")]]
        for name in names:
            lines[0] += fitted([(name, "bold")], each)
        for figure in compared(rows, self._now):
            line: Line = [(figure.label.ljust(_LABEL), "dim")]
            for number, value in enumerate(figure.values):
                best = number in figure.best
                line += fitted([(f"{value} ◆" if best else value, "good" if best else "")], each)
            lines.append(line)
        if len(rows) < len(self._rows):
            lines.append([(f"{len(self._rows) - len(rows)} more in a wider terminal", "dim")])
        return [*lines, [], [("◆ best of these", "dim")]]


class OffersCompared(ModalScreen[None]):
    """The comparison in a box."""

    BINDINGS = [("escape,q,enter,t", "dismiss", "Close")]  # noqa: RUF012

    def __init__(self, rows: Sequence[OfferRow], now: float) -> None:
        super().__init__()
        self._rows, self._now = rows, now

    def compose(self) -> ComposeResult:
        """A box that scrolls."""
        with VerticalScroll(id="dialog") as dialog:
            dialog.border_title = f"{len(self._rows)} offers"
            dialog.border_subtitle = "esc or q closes"
            yield OfferColumns(self._rows, self._now)
