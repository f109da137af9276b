"""LogPane: what a run says in words, its answers to held-out prompts, and its figures beside the predicted ones."""

from __future__ import annotations

import math
import time

from ...planner.plan import Plan
from .. import format  # noqa: A004
from ..history import History, LogEntry
from .lines import Line, Lines, fitted

VIEWS = ("log", "answers", "plan")

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

    def show(self, history: History, plan: Plan | None) -> None:
        """Draw a run's words."""
        self._history, self._plan = history, plan
        self.redraw()

    def next_view(self) -> None:
        """Go to the next view."""
        self.view = VIEWS[(VIEWS.index(self.view) + 1) % len(VIEWS)]
        self.redraw()

    def title(self, width: int) -> Line:
        """The views, the current one marked."""
        names = {"log": "log", "answers": "answers", "plan": "predicted and measured"}
        line: Line = []
        for view in VIEWS:
            line += [(names[view], "bold" if view == self.view else "dim"), ("  ", "")]
        return line[:-1]

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if self.view == "answers":
            return _answers(self._history, width)
        if self.view == "plan":
            return _comparison(self._history, self._plan, width)
        return [_entry(entry, width) for entry in newest(self._history, height)]


def newest(history: History, count: int) -> list[LogEntry]:
    """The newest ``count`` entries. Of the steps only the latest stays when something more telling would be lost."""
    entries = list(history.log)
    if len(entries) <= count:
        return entries
    telling = [entry for entry in entries if entry.kind not in ("step", "phase")]
    kept = telling[-max(count - max(count // 3, 1), 0) :] if count > 1 else []
    rest = [entry for entry in entries if entry.kind in ("step", "phase")][-(count - len(kept)) :]
    chosen = {id(entry) for entry in [*kept, *rest]}
    return [entry for entry in entries if id(entry) in chosen]


def _entry(entry: LogEntry, width: int) -> Line:
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


def _comparison(history: History, plan: Plan | None, width: int) -> list[Line]:
    if plan is None:
        return [[("this run's plan can't be read", "warn")]]
    used = [gpu["memory_used_gib"] for gpu in history.gpus.values() if gpu.get("memory_used_gib") is not None]
    memory, peak = plan.memory, max(history.peak_gib.values(), default=math.nan)
    if plan.hardware.kind == "cpu":  # there is no allocator to ask: the peak is that of the process
        rows = [("process, peak", memory.device_gib, peak, format.gib)]
    else:
        reserved = max(history.reserved_gib.values(), default=math.nan)
        rows = [
            ("peak allocated", memory.allocated_gib, peak, format.gib),
            ("peak reserved", memory.reserved_gib, reserved, format.gib),
            ("device, now", memory.device_gib, max(used, default=math.nan), format.gib),
        ]
    rows.append(("tokens/s", plan.speed.tokens_per_s, history.median_rate(), format.rate))
    lines: list[Line] = [[(f"{'':16}{'predicted':>14}{'measured':>14}{'off by':>9}", "dim")]]
    for label, predicted, measured, show in rows:
        known = math.isfinite(measured) and measured > 0
        off = f"{predicted / measured - 1:+.0%}" if known else "–"
        lines.append([(f"{label:16}{show(predicted):>14}{show(measured) if known else '–':>14}{off:>9}", "")])
    lines.append([(f"predicted by {plan.basis}", "dim")])
    return lines
