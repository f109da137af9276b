"""MemoryBar: one GPU's predicted memory against what the card has, whole and term by term."""

from __future__ import annotations

from ...planner.plan import Plan
from .. import format  # noqa: A004
from ..plan_view import verdict
from .lines import Line, Span, length, spread, wrapped
from .term_rows import TermRows

_VERDICT_ROLES = {"✔": "good", "!": "warn", "✘": "bad"}


def bar(filled: float, width: int, role: str = "accent") -> list[Span]:
    """A bar of ``width`` cells of which a share (0 to 1) is filled."""
    cells = min(max(round(filled * width), 1 if filled > 0 else 0), width) if filled == filled else 0
    return [("█" * cells, role), ("░" * (width - cells), "empty")]


def interval_line(plan: Plan, width: int) -> Line:
    """A ruler below the bar: where the lowest and the highest prediction end, and how full the card gets."""
    memory, capacity = plan.memory, max(plan.hardware.memory_gib, 1e-9)
    low, high = (min(round(value / capacity * width), width - 1) for value in (memory.low_gib, memory.high_gib))
    text = f"{format.bare_gib(memory.low_gib)}–{format.gib(memory.high_gib)}"
    ruler = f"├{'─' * max(high - low - 1, 0)}┤" if high > low else "│"
    line: Line = [(" " * low, ""), (ruler, "dim")]
    if low + len(ruler) + 2 + len(text) <= width:
        return [*line, (f"  {text}", "dim")]
    if low >= len(text) + 2:
        return [(" " * (low - len(text) - 2), ""), (f"{text}  ", "dim"), (ruler, "dim")]
    return [(text.center(width), "dim")]


def _terms(plan: Plan) -> list[tuple[float, str]]:
    """What is worth a row, largest first."""
    return sorted(((value, name) for name, value in plan.memory.terms.items() if value >= 0.005), reverse=True)


class MemoryBar(TermRows):
    """The verdict, the bar, and a row per term, largest first."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._plan: Plan | None = None
        self._note = "planning…"

    def names(self) -> list[str]:
        """See :class:`TermRows`."""
        return [name for _, name in _terms(self._plan)] if self._plan is not None else []

    def show(self, plan: Plan | None, note: str = "planning…") -> None:
        """Draw a plan's memory, or in its place a note that says why there is none."""
        rows = self.lines_needed(self.size.width)
        self._plan, self._note = plan, note
        if rows != self.lines_needed(self.size.width):
            self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if self._plan is None:
            return wrapped(self._note, width, "bad" if self._note.startswith("✘") else "dim")
        if width < 12:
            return []
        plan, memory = self._plan, self._plan.memory
        glyph, word = verdict(plan)
        role = _VERDICT_ROLES[glyph]
        capacity = max(plan.hardware.memory_gib, 1e-9)
        share = memory.device_gib / capacity
        figures: Line = [(format.gib_of(memory.device_gib, capacity), "bold"), (f" {share:5.0%}", role)]
        head: Line = [(f"{glyph} {word}", role)]
        if length(head) + length(figures) >= width:
            figures = figures[:1]
        lines = [
            spread(head, figures, width) if length(head) + length(figures) < width else head,
            bar(share, width, role),
            interval_line(plan, width),
        ]
        terms = _terms(plan)
        largest = max((value for value, _ in terms), default=1.0)
        for value, name in terms:
            label, figure = name.ljust(12), format.gib(value).rjust(9)
            room = width - 2 - len(label) - len(figure) - 1
            row: Line = [*self.mark(name), (f"{label}", "bold" if name == self.current else "")]
            if room >= 4:
                cells = max(round(value / largest * room), 1)
                row += [("━" * cells, "second"), (" " * (room - cells + 1), "")]
            lines.append([*row, (figure, "")])
        return lines
