"""LogPane: what a run says in words, its answers to held-out prompts, and its figures beside the predicted ones."""

from __future__ import annotations

import math
import time

from ...planner.plan import Plan
from .. import format  # noqa: A004
from ..against_plan import predicted_and_measured
from ..history import History, LogEntry, StepEntry
from .lines import Line, Lines, fitted

VIEWS = ("log", "answers", "plan", "memory")

_ROLES = {
    "step": "dim",
    "phase": "",
    "log": "dim",
    "state": "bold",
    "eval": "second",
    "checkpoint": "good",
    "warning": "warn",
    "fallback": "warn",
    "failure": "bad",
}
_GLYPHS = {"warning": "!", "fallback": "!", "failure": "✘", "checkpoint": "◆", "eval": "●", "state": "▸"}


class LogPane(Lines):
    """The pane below the charts; :attr:`view` is one of :data:`VIEWS`."""

    TITLED = True

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self.view = "log"
        self._history = History()
        self._plan: Plan | None = None
        self._elapsed_s = 0.0
        self._live = False

    def show(self, history: History, plan: Plan | None, elapsed_s: float = 0.0, *, live: bool = False) -> None:
        """Draw a run's words; ``elapsed_s`` is the time it was at work."""
        self._history, self._plan, self._elapsed_s, self._live = history, plan, elapsed_s, live
        self.redraw()

    def next_view(self) -> None:
        """Go to the next view."""
        self.view = VIEWS[(VIEWS.index(self.view) + 1) % len(VIEWS)]
        self.redraw()

    def title(self, width: int) -> Line:
        """The views, the current one marked."""
        names = {"log": "log", "answers": "answers", "memory": "memory", "plan": "predicted and measured"}
        line: Line = []
        for view in VIEWS:
            line += [(names[view], "bold" if view == self.view else "dim"), ("  ", "")]
        return line[:-1]

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if self.view == "answers":
            return _answers(self._history, width)
        if self.view == "plan":
            ends_s = self._elapsed_s + (self._history.eta_s() if self._live else 0.0)
            return _comparison(self._history, self._plan, ends_s, width, height)
        if self.view == "memory":
            return _ranks(self._history, self._plan, width)
        return [_entry(entry, width) for entry in newest(self._history, height)]


def newest(history: History, count: int) -> list[LogEntry | StepEntry]:
    """The newest ``count`` entries. Of the steps only the latest stays when something more telling would be lost."""
    entries = list(history.log)
    if len(entries) <= count:
        return entries
    telling = [entry for entry in entries if entry.kind not in ("step", "phase")]
    kept = telling[-max(count - max(count // 3, 1), 0) :] if count > 1 else []
    rest = [entry for entry in entries if entry.kind in ("step", "phase")][-(count - len(kept)) :]
    chosen = {id(entry) for entry in [*kept, *rest]}
    return [entry for entry in entries if id(entry) in chosen]


def _entry(entry: LogEntry | StepEntry, width: int) -> Line:
    clock = time.strftime("%H:%M:%S", time.localtime(entry.time))
    role = _ROLES.get(entry.kind, "")
    return fitted([(f"{clock} ", "dim"), (f"{_GLYPHS.get(entry.kind, ' ')} {entry.text}", role)], width)


def _answers(history: History, width: int) -> list[Line]:
    if not history.answers:
        return [[("no answers yet: held-out prompts are answered before and after training", "dim")]]
    lines: list[Line] = []
    for answer in history.answers.values():
        lines.append(fitted([("prompt  ", "dim"), (_flat(answer.prompt), "bold")], width))
        lines.append(fitted([("before  ", "dim"), (_flat(answer.before), "")], width))
        if answer.after != answer.before or answer.step:
            lines.append(fitted([("after   ", "dim"), (_flat(answer.after), "good")], width))
    return lines


def _flat(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _ranks(history: History, plan: Plan | None, width: int) -> list[Line]:
    """What each rank's allocator holds now, has reserved at most and has held at most; several ranks to a line."""
    ranks = sorted(history.peak_gib)
    if not ranks:
        return [[("no rank has told its memory yet", "dim")]]
    cell = 47
    across = max(width // cell, 1)
    head = f"{'rank':>4}{'allocated':>13}{'at most':>13}{'reserved':>13}".ljust(cell)
    lines: list[Line] = [[(head * min(across, len(ranks)), "dim")]]
    for first in range(0, len(ranks), across):
        lines.append([])
        for rank in ranks[first : first + across]:
            figures = (history.allocated_gib[rank], history.peak_gib[rank], history.reserved_gib[rank])
            text = f"{rank:>4}" + "".join(format.gib(figure).rjust(13) for figure in figures)
            lines[-1].append((text.ljust(cell), ""))
    if plan is not None and plan.hardware.kind != "cpu":
        planned = f"planned: {format.gib(plan.memory.allocated_gib)} allocated at most, "
        lines.append([(f"{planned}{format.gib(plan.memory.reserved_gib)} reserved", "dim")])
    return lines


def _comparison(history: History, plan: Plan | None, ends_s: float, width: int, height: int) -> list[Line]:
    if plan is None:
        return [[("this run's plan can't be read", "warn")]]
    head: Line = [(f"{'':16}{'predicted':>13}{'measured':>13}{'off by':>8}", "dim")]
    rows: list[Line] = []
    for label, predicted, measured, show in predicted_and_measured(history, plan, ends_s):
        known = math.isfinite(measured) and measured > 0
        off = format.off(predicted / measured) if known else "–"
        rows.append([(f"{label:16}{show(predicted):>13}{show(measured) if known else '–':>13}{off:>8}", "")])
    if len(rows) + 2 > height and width >= 2 * 50 + 4:
        half = (len(rows) + 1) // 2
        right = rows[half:] + [[]] * (2 * half - len(rows))
        rows = [[*one, ("    ", ""), *other] for one, other in zip(rows[:half], right, strict=True)]
        head = [*head, ("    ", ""), *head]
    return [head, *rows, [(f"predicted by {plan.basis}", "dim")]]
