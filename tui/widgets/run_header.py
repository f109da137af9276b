"""RunHeader: one run in two lines, and two more when it has ended and there is something to say about it."""

from __future__ import annotations

import math

from ...engine.status import LIVE_STATES, Status
from ...planner.plan import Plan
from .. import format  # noqa: A004
from ..format import short_name
from ..history import History
from .lines import Line, Lines, Span, fitted, length, spread, wrapped
from .memory_bar import bar

STATE_ROLES = {
    "preparing": "accent",
    "running": "good",
    "stopping": "warn",
    "finished": "good",
    "stopped": "warn",
    "failed": "bad",
    "lost": "bad",
}


def state_span(state: str, cause: str | None = None) -> Span:
    """A state as glyph and word, with its cause if it has one."""
    glyph = format.STATE_GLYPHS.get(state, ("?", "?"))[0]
    return (f"{glyph} {state}" + (f": {cause}" if cause else ""), STATE_ROLES.get(state, ""))


def eta_text(history: History, state: str) -> str:
    """How long the run still takes, as far as this session's steps tell."""
    if state not in LIVE_STATES:
        return ""
    return f"ETA {format.duration(history.eta_s())}"


class RunHeader(Lines):
    """Name, state, progress, time left, money; why a run ended and what to try."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._run_name = ""
        self._history = History()
        self._status = Status()
        self._plan: Plan | None = None
        self._now = 0.0
        self._place = self._after = self._nothing = ""

    def show_nothing(self, words: str) -> None:
        """Draw why there is no run."""
        self._nothing = words
        self.refresh(layout=True)
        self.redraw()

    def show(
        self,
        name: str,
        history: History,
        status: Status,
        plan: Plan | None,
        now: float,
        place: str = "",
        after: str = "",
    ) -> None:
        """Draw a run; ``place`` is its position among several (``2 of 5``), ``after`` what can be done with it now."""
        rows = self.lines_needed(self.size.width)
        self._run_name, self._history, self._status, self._plan, self._now = name, history, status, plan, now
        self._place, self._after, self._nothing = place, after, ""
        if rows != self.lines_needed(self.size.width):
            self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if self._nothing:
            return wrapped(f" {self._nothing}", width, "dim", indent=" ")
        if not self._run_name or width < 10:
            return []
        status, live = self._status, self._status.state in LIVE_STATES
        elapsed = status.elapsed_s(self._now)
        left: Line = [(f" {self._run_name}  ", "bold"), state_span(status.state, status.cause)]
        if status.attempt > 1:
            left.append((f"  attempt {status.attempt}", "dim"))
        right: Line = [(f"{self._where()} ", "dim")]
        if self._place and length(left) + length(right) + len(self._place) + 4 < width:
            right = [(f"run {self._place}  ", "dim"), *right]
        lines = [spread(left, right, width) if length(left) + length(right) < width else fitted(left, width)]
        lines.append(self._progress(elapsed, width))
        if status.message:  # a live run has one where the connection to its machine is lost
            role = "warn" if live else STATE_ROLES.get(status.state, "")
            lines += wrapped(f" {status.message}", width - 1, role, indent="   ")[:3]
            if status.do:
                lines += wrapped(f" Try: {status.do}", width - 1, "bold", indent="   ")[:3]
        if self._after:
            lines += wrapped(f" Next: {self._after}", width - 1, "dim", indent="   ")[:3]
        return lines

    def _where(self) -> str:
        if self._plan is None:
            return ""
        hardware = self._plan.hardware
        name = short_name(hardware.gpu)
        return f"{hardware.count} × {name}" if hardware.count > 1 or hardware.kind == "cuda" else name

    def _progress(self, elapsed: float, width: int) -> Line:
        history = self._history
        cost = history.cost_usd(self._plan, elapsed)
        planned = self._plan.cost.usd if self._plan else 0.0
        projected = history.projected_usd(self._plan, elapsed)
        live = self._status.state in LIVE_STATES
        took = f"{format.duration(elapsed)} so far" if live else f"took {format.duration(elapsed)}"
        parts = [took] if elapsed else []
        if eta := eta_text(history, self._status.state):
            left_s = history.eta_s()
            at = f", {format.clock(self._now + left_s, self._now)}" if width >= 96 and left_s >= 3600 else ""
            parts.append(eta + at)
        if live and (planned or cost):
            total = projected if math.isfinite(projected) else planned
            parts.append(f"{format.usd(cost)} of ~{format.usd(total)}" if total else format.usd(cost))
        elif cost:
            parts.append(format.usd(cost))
        if planned and width >= 110:
            parts.append(f"(plan {format.duration(self._plan.time_s)}, {format.usd(planned)})" if self._plan else "")
        steps = f"step {history.step:,}/{history.steps:,}" if history.steps else "no step yet"
        if history.phase and live:
            steps = history.phase if not history.step else f"{steps}  {history.phase}"
        left: Line = [(f" {steps}  ", "")]
        if live and not history.phase and (overdue := history.overdue_s(self._now)):
            left.append((f"! no step for {format.duration(overdue)}  ", "warn"))
        while len(parts) > 1 and length(left) + len("  ".join(parts)) + 2 > width:
            parts.pop(0)
        right: Line = [("  ".join(parts) + " ", "")]
        room = width - length(left) - length(right) - 1
        share = history.step / history.steps if history.steps else 0.0
        if history.steps and room >= 8:
            cells = min(room, 40)
            left += [*bar(share, cells - 6), (f" {share:4.0%} ", "")]
        return spread(left, right, width)
