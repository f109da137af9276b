"""A run's report: what came out of it beside what was planned, as Markdown; its steps as CSV; its loss as SVG."""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..engine.evaluation.records import evaluations_of
from ..engine.events import EventReader
from ..engine.past import SAMPLED_TYPES
from ..engine.run import Run
from ..engine.status import LIVE_STATES, Status
from ..planner.errors import RunError
from ..planner.plan import Plan
from ..planner.printable import printable
from ..planner.version import VERSION
from . import format  # noqa: A004
from .against_plan import predicted_and_measured
from .comparison import Contender, settings
from .curves_svg import Drawn, curves_svg
from .evaluation_view import summary_of, table_of
from .follower import read_whole
from .history import number

_COLUMNS = (
    "step", "attempt", "epoch", "tokens", "time", "loss", "learning_rate", "grad_norm", "tokens_per_s", "step_s",
    "held_out_loss",
)  # fmt: skip
#: Words of a run that a report keeps, and its evaluations; of more, the newest.
_NOTES, _EVALUATIONS = 30, 3


@dataclasses.dataclass(frozen=True)
class Report:
    """A run as far as it has come."""

    contender: Contender
    status: Status

    @classmethod
    def of(cls, run: Run) -> Report:
        """Read a run.

        Raises:
            RunError: there is no such run any more.
        """
        return cls(read_whole(run, Contender.of(run)), run.status)

    @property
    def _ends_s(self) -> float:
        """Seconds it was at work, or will have been at its end at this pace."""
        live = self.status.state in LIVE_STATES
        return self.status.elapsed_s() + (self.contender.history.eta_s() if live else 0.0)

    def figures(self) -> dict[str, Any]:
        """The same as a tree of plain values; a figure that there is none of is None."""
        history, plan, status = self.contender.history, self.contender.plan, self.status
        elapsed = status.elapsed_s()
        planned = predicted_and_measured(history, plan, self._ends_s) if plan else []
        return {
            "name": self.contender.run.name, "state": status.state, "cause": status.cause, "message": status.message,
            "do": status.do, "attempt": status.attempt, "step": history.step, "steps": history.steps,
            "tokens": history.tokens, "elapsed_s": _known(elapsed), "usd": _known(history.cost_usd(plan, elapsed)),
            "loss": _known(history.loss.latest), "loss_mean": _known(history.average.latest),
            "held_out_first": _known(_first(history.evaluation)), "held_out_best": _known(history.best_evaluation()),
            "not_finite": history.not_finite, "checkpoint_step": history.checkpoint_step,
            "against_plan": {
                label: {"predicted": _known(predicted), "measured": _known(measured)}
                for label, predicted, measured, _ in planned
            },
            "settings": settings(self.contender),
            "evaluations": [{"name": name, **tree} for name, tree in self._evaluations()],
        }  # fmt: skip

    def markdown(self) -> str:
        """The report as Markdown."""
        return "\n".join(self._lines()) + "\n"

    def svg(self) -> str:
        """The loss, its mean and the held-out losses over the steps, with what happened on the way."""
        history = self.contender.history
        curves = [
            Drawn("loss", history.loss, thin=True),
            Drawn("mean of about 10 steps", history.average),
            Drawn("held-out loss", history.evaluation, points=True),
        ]
        shown = [curve for curve in curves if curve.series]
        name = self.contender.run.name
        return curves_svg(f"{name}: loss", shown, across="steps", end_label="{:,.0f}".format, marks=history.marks)

    def _lines(self) -> Iterator[str]:
        history, plan, status = self.contender.history, self.contender.plan, self.status
        cause = f" ({status.cause})" if status.cause else ""
        yield f"# {_md(self.contender.run.name)}"
        yield ""
        yield f"**{status.state}{cause}** after {history.step:,} of {history.steps:,} steps, attempt {status.attempt}."
        if status.message:
            yield f"{_md(status.message)}. {_md(status.do)}".replace("..", ".").strip()
        yield ""
        yield from _table(("", ""), self._outcome(plan))
        yield from self._evaluated()
        if plan is not None:
            yield from self._against(plan)
            yield "## Settings"
            yield ""
            yield from _table(("setting", "value"), list(settings(self.contender).items()))
        notes = [entry for entry in history.log if entry.kind not in ("step", "phase", "log")][-_NOTES:]
        if notes:
            yield "## What happened"
            yield ""
            yield from (f"- {_clock(entry.time)} {entry.kind}: {_md(entry.text)}" for entry in notes)
            yield ""
        yield f"finetui {VERSION}"

    def _evaluations(self) -> list[tuple[str, dict[str, Any]]]:
        return evaluations_of(self.contender.run)[-_EVALUATIONS:]

    def _evaluated(self) -> Iterator[str]:
        for name, tree in self._evaluations():
            columns, rows = table_of(tree)
            names = tuple(column.name for column in columns)
            yield f"## Evaluation {_md(name)}"
            yield ""
            yield f"{_md(str(tree['rows']['source']))}: {tree['rows']['count']:,} rows."
            yield ""
            yield from _table(tuple(map(_md, names)), [[row[one] for one in names] for row in rows])
            yield from (f"- {_md(line)}" for line in summary_of(tree))
            yield ""

    def _outcome(self, plan: Plan | None) -> list[tuple[str, str]]:
        history, elapsed = self.contender.history, self.status.elapsed_s()
        rows = [
            ("loss, last step", format.loss(history.loss.latest)),
            ("loss, mean", format.loss(history.average.latest)),
        ]
        if history.evaluation:
            first, best = _first(history.evaluation), history.best_evaluation()
            rows.append(("held-out loss, first → best", f"{format.loss(first)} → {format.loss(best)}"))
        rows += [
            ("tokens", f"{history.tokens:,}"),
            ("time at work", format.duration(elapsed)),
            ("cost", format.usd(history.cost_usd(plan, elapsed))),
        ]
        if plan is not None:
            rows.append(("hardware", f"{plan.hardware.count} × {plan.hardware.gpu}"))
        if history.not_finite:
            rows.append(("steps with a figure that was not finite", str(history.not_finite)))
        return rows

    def _against(self, plan: Plan) -> Iterator[str]:
        live = self.status.state in LIVE_STATES
        yield f"## Planned and measured{' so far' if live else ''}"
        yield ""
        rows = []
        for label, predicted, measured, show in predicted_and_measured(self.contender.history, plan, self._ends_s):
            known = math.isfinite(measured) and measured > 0
            off = format.off(predicted / measured) if known else "–"
            rows.append((label, show(predicted), show(measured) if known else "–", off))
        yield from _table(("", "planned", "measured", "plan off by"), rows)
        yield f"Planned by {plan.basis}."
        yield ""


def write_csv(run: Run, out: TextIO) -> None:
    """Each step as a row, in the order they were made: a resumed run repeats some, under the next ``attempt``.

    ``time`` is seconds since the epoch, ``held_out_loss`` and the method's own figures stand in the row of their step.
    The file is read twice, since a CSV names its columns first; neither time does it have to fit into memory.
    """
    names: dict[str, None] = {}
    for event in _events(run):
        if event.type == "metrics":
            names |= dict.fromkeys(event.data.get("values") or {})
    writer = csv.DictWriter(out, [*_COLUMNS, *(name for name in names if name not in _COLUMNS)], lineterminator="\n")
    writer.writeheader()
    row: dict[str, Any] = {}
    attempt = 1
    for event in _events(run):
        data = event.data
        if event.type == "state":
            attempt = int(data.get("attempt", attempt))
        elif event.type == "step":
            if row:
                writer.writerow(row)
            row = {name: data.get(name) for name in _COLUMNS if name in data}
            row |= {"attempt": attempt, "time": event.time}
        elif event.type in ("eval", "metrics") and data.get("step") == row.get("step"):
            row |= {"held_out_loss": data.get("loss")} if event.type == "eval" else data.get("values") or {}
        elif event.type == "eval":  # before the first step, or of one that is not told
            writer.writerow({"step": data.get("step"), "attempt": attempt, "time": event.time,
                             "held_out_loss": number(data.get("loss"))})  # fmt: skip
    if row:
        writer.writerow(row)


def _events(run: Run) -> Iterator[Any]:
    reader = EventReader(run.events_path)
    while events := reader.read(2000, skip=SAMPLED_TYPES):
        yield from events


def _table(head: tuple[str, ...], rows: list[Any]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(_md(cell) for cell in row) + " |"
    yield ""


def _md(text: str) -> str:
    """Text that stays text in Markdown, on one line."""
    plain = printable(" ".join(str(text).split()))
    for character in "\\`*_|<>[]":
        plain = plain.replace(character, f"\\{character}")
    return plain


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _first(series: Any) -> float:
    return series.buckets[0].end if series.buckets else math.nan


def _known(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def write_files(run: Run, markdown: Path, steps: Path, picture: Path) -> None:
    """Write all three forms of a run's report.

    Raises:
        RunError: the run has not made a step, or a file can't be written.
    """
    report = Report.of(run)
    refuse_empty(report)
    try:
        markdown.write_text(report.markdown(), encoding="utf-8")
        picture.write_text(report.svg(), encoding="utf-8")
        with steps.open("w", encoding="utf-8", newline="") as file:
            write_csv(run, file)
    except OSError as error:
        what = f"the report can't be written ({error.strerror})"
        raise RunError(what, where=str(error.filename), do="Make room there, or give another folder.") from error


def refuse_empty(report: Report) -> None:
    """Raise where there is nothing to report.

    Raises:
        RunError: the run has not made a step.
    """
    if not report.contender.history.step:
        raise RunError("has not made a step", where=report.contender.run.name, do="Wait for its first one.")
