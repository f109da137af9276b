"""RunDetails: one run of the table in words."""

from __future__ import annotations

import math

from .. import format  # noqa: A004
from ..keys import key_of, keys_of
from ..run_table import RunRow
from .lines import Line, Lines, wrapped
from .run_header import STATE_ROLES

#: What is said wherever a run would be shown.
NO_RUNS = (
    f"no runs yet. {next(key.shown for key in keys_of('runs') if key.action == 'app.try_it')} sets up a first one: a "
    "tiny shipped model, about a minute, no GPU needed. "
    f"Or make your own plan ({key_of('plan')}) and launch it ({key_of('launch')})"
)


class RunDetails(Lines):
    """The run under the cursor: why it ended, what to try, what it is."""

    def __init__(self) -> None:
        super().__init__()
        self._row: RunRow | None = None
        self._now = 0.0
        self._why = ""

    def show(self, row: RunRow | None, now: float, why: str = "") -> None:
        """Draw a run; without one, ``why`` there is none to show."""
        self._row, self._now, self._why = row, now, why
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        row = self._row
        if row is None:
            return wrapped(self._why or NO_RUNS, width, "dim")
        lines: list[Line] = []
        if row.message:
            lines += wrapped(row.message, width, STATE_ROLES.get(row.state, ""))
        if row.do:
            lines += wrapped(f"Try: {row.do}", width, "bold")
        attempt = f", attempt {row.attempt}" if row.attempt > 1 else ""
        model = f"{row.model}, {row.tuning}" if row.model else "not known: plan.json can't be read"
        lines.append([("model    ", "dim"), (f"{model}{attempt}", "")])
        memory = [f"{format.gib(row.planned_gib)} planned"] if math.isfinite(row.planned_gib) else []
        memory += [f"{format.gib(row.peak_gib)} reserved at most"] if math.isfinite(row.peak_gib) else []
        lines.append([("memory   ", "dim"), (", ".join(memory) or "–", "")])
        planned = f" of {format.duration(row.planned_s)} planned" if math.isfinite(row.planned_s) else ""
        saved = f", checkpoint at step {row.checkpoint_step:,}" if row.checkpoint_step else ", no checkpoint"
        lines.append([("time     ", "dim"), (f"{format.duration(row.elapsed_s)}{planned}{saved}", "")])
        when = "at work" if row.live else f"ended {format.ago(row.when, self._now)}"
        lines.append([("when     ", "dim"), (f"{when}, {row.place}" if row.place else when, "")])
        lines.append([("folder   ", "dim"), (format.path(row.run.path), "")])
        return lines
