"""What the Runs screen knows about each run, gathered in a thread and handed over as plain rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..engine.events import EventReader
from ..engine.past import essentials
from ..engine.remote.machine import MirroredRun
from ..engine.run import Run
from ..engine.status import LIVE_STATES
from ..planner.errors import RunError
from ..planner.plan import Plan
from .format import short_name
from .history import History


@dataclass(frozen=True)
class RunRow:
    """One run at one moment. NaN is a figure that there is none of."""

    run: Run
    state: str
    cause: str | None
    message: str
    do: str
    step: int
    steps: int
    loss: float
    best: float
    tokens_per_s: float
    elapsed_s: float
    cost_usd: float
    place: str
    when: float
    attempt: int
    model: str
    tuning: str
    checkpoint_step: int | None
    planned_gib: float
    peak_gib: float
    planned_s: float
    created: float = 0.0
    held_out: float = math.nan
    """The newest held-out loss."""

    @property
    def live(self) -> bool:
        """Whether a process is at work on it."""
        return self.state in LIVE_STATES


def _or_last(value: float) -> float:
    """NaN as what comes after all figures."""
    return value if math.isfinite(value) else math.inf


#: What the table of runs can be sorted by, each with the figure that is smaller for what comes first.
SORTS: dict[str, Callable[[RunRow], float | str]] = {
    "newest": lambda row: -row.created,
    "held-out loss": lambda row: _or_last(row.best),
    "loss": lambda row: _or_last(row.loss),
    "speed": lambda row: _or_last(-row.tokens_per_s),
    "cost": lambda row: -row.cost_usd,
    "name": lambda row: row.run.name.lower(),
}


def arranged(rows: Iterable[RunRow], *, sort: str = "newest", words: str = "") -> list[RunRow]:
    """The rows to show: those that have all ``words`` in name, state, cause, model, tuning or place."""
    wanted = words.lower().split()
    shown = [row for row in rows if all(word in _words_of(row) for word in wanted)]
    return sorted(shown, key=lambda row: (SORTS[sort](row), -row.created))


def _words_of(row: RunRow) -> str:
    return f"{row.run.name} {row.state} {row.cause or ''} {row.model} {row.tuning} {row.place}".lower()


def place_of(run: Run) -> str:
    """A run's directory; of a run on another machine, the one there."""
    return f"{run.host.address}:{run.remote}" if isinstance(run, MirroredRun) else str(run.path)


def latest(run: Run) -> tuple[EventReader, History]:
    """What a run's outcome and its newest events say, without reading all of a long one; and who reads on."""
    history = History()
    try:
        past = essentials(run.events_path)
    except OSError:  # not written yet
        return EventReader(run.events_path), history
    for event in past.events:
        history.apply(event)
    after = past.events[-1].seq if past.events else 0
    return EventReader(run.events_path, after, past.offset), history


class RunScanner:
    """Folds each run's events as they come; a run that has not changed costs one ``stat``."""

    def __init__(self, list_runs: Callable[[], list[Run]], now: Callable[[], float]) -> None:
        self._list, self._now = list_runs, now
        self._known: dict[str, tuple[EventReader, History, Plan | None]] = {}

    def scan(self) -> list[RunRow]:
        """All runs as they are now, newest first; directories that are no runs are passed over."""
        rows = []
        for run in self._list():
            try:
                rows.append(self._row(run))
            except RunError:
                continue  # deleted between listing and reading
        return rows

    def _row(self, run: Run) -> RunRow:
        key = str(run.path)
        if key not in self._known:
            try:
                plan: Plan | None = run.plan
            except RunError:
                plan = None
            self._known[key] = (*latest(run), plan)
        reader, history, plan = self._known[key]
        status = run.status
        for event in reader.read():
            history.apply(event)
        live = status.state in LIVE_STATES
        elapsed = status.elapsed_s(self._now())
        hardware = plan.hardware if plan else None
        name = short_name(hardware.gpu) if hardware else ""
        return RunRow(
            run=run,
            state=status.state,
            cause=status.cause,
            message=status.message,
            do=status.do,
            step=history.step,
            steps=history.steps or (plan.resolved.steps if plan else 0),
            loss=history.loss.latest,
            best=history.best_evaluation(),
            tokens_per_s=history.tokens_per_s.latest,
            elapsed_s=elapsed,
            cost_usd=history.cost_usd(plan, elapsed),
            place=f"{hardware.count}×{name}" if hardware and hardware.kind == "cuda" else name,
            when=self._now() if live else status.ended or history.last_time or status.created,
            attempt=status.attempt,
            model=plan.model.name if plan else "",
            tuning=plan.resolved.tuning if plan else "",
            checkpoint_step=history.checkpoint_step,
            planned_gib=plan.memory.device_gib if plan else math.nan,
            peak_gib=max(history.reserved_gib.values(), default=math.nan),
            planned_s=plan.time_s if plan else math.nan,
            created=status.created,
            held_out=history.evaluation.latest,
        )
