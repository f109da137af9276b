"""CheckList: what preflight found, the failures first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import format  # noqa: A004
from ..format import CHECK_GLYPHS
from .lines import Line, Lines, wrapped

if TYPE_CHECKING:
    from ...engine.check import Check

_ROLES = {"ok": "good", "warn": "warn", "fail": "bad"}


class CheckList(Lines):
    """The checks made so far."""

    def __init__(self) -> None:
        super().__init__()
        self._checks: list[Check] = []
        self._note = ""

    def show(self, checks: list[Check], note: str) -> None:
        """Draw checks, and below them a note on those that are still to come."""
        self._checks, self._note = list(checks), note
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        lines: list[Line] = []
        for check in sorted(self._checks, key=lambda check: ("fail", "warn", "ok").index(check.status)):
            glyph, role = CHECK_GLYPHS[check.status], _ROLES[check.status]
            told = format.sentence(f"{check.name}: {check.detail}" if check.detail else check.name)
            first, *rest = wrapped(told, max(width - 2, 8))
            lines.append([(f"{glyph} ", role), *[(text, "" if check.status == "ok" else role) for text, _ in first]])
            lines += [[("  ", ""), *line] for line in rest]
            if check.do and check.status != "ok":
                lines += [[("  ", ""), *line] for line in wrapped(format.sentence(check.do), max(width - 2, 8), "dim")]
        if self._note:
            lines += wrapped(self._note, width, "dim")
        return lines
