"""ComparisonTable: what differs between runs, and how each came out against its plan, one column per run."""

from __future__ import annotations

from collections.abc import Sequence

from ..comparison import Contender, differences, ending, outcome, outcome_rows
from .lines import Line, Lines, fitted, wrapped
from .run_details import NO_RUNS
from .run_header import STATE_ROLES

#: One letter and one colour per run.
LETTERS = "ABCDEF"
ROLES = ("accent", "second", "good", "warn", "bad", "")
#: How runs come here.
_HOW = "the two newest runs are compared, or those marked with space on Runs"


class ComparisonTable(Lines):
    """Runs as columns. As high as it has to be: put it into something that scrolls."""

    def __init__(self) -> None:
        super().__init__()
        self._contenders: Sequence[Contender] = ()

    def show(self, contenders: Sequence[Contender]) -> None:
        """Draw these runs."""
        self._contenders = contenders
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        contenders = self._contenders
        if not contenders:
            return [*wrapped(NO_RUNS, width, "dim"), [("", "")], *wrapped(_HOW, width, "dim")]
        head, names = 16, [contender.run.name for contender in contenders]
        cell = max((width - head) // len(contenders), 6)
        lines: list[Line] = [[(" " * head, "")]]
        for letter, role, name in zip(LETTERS, ROLES, names, strict=False):
            lines[0] += [*fitted([(f"{letter} {name}", role or "bold")], cell - 1), (" ", "")]
        states: Line = [("state".ljust(head), "dim")]
        for contender in contenders:
            role = STATE_ROLES.get(contender.status.state, "")
            states += [*fitted([(ending(contender), role)], cell - 1), (" ", "")]
        lines.append(states)
        outcomes = [outcome(contender) for contender in contenders]
        for label, values in outcome_rows(outcomes):
            lines.append(_row(label, values, head, cell, ""))
        different = differences(contenders)
        lines.append([("settings that differ" if different else "no setting differs", "dim")])
        lines += [_row(key.replace("_", " "), values, head, cell, "") for key, values in different]
        return lines


def _row(label: str, values: Sequence[str], head: int, cell: int, role: str) -> Line:
    line: Line = [*fitted([(label, "dim")], head - 1), (" ", "")]
    for value in values:
        line += [*fitted([(value, role)], cell - 1), (" ", "")]
    return line
