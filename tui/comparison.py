"""Several runs side by side: their curves over steps, tokens, time or money, what differs in their settings, and how
each came out against its plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..engine.events import Event
from ..engine.run import Run
from ..engine.status import Status
from ..planner.errors import RunError
from ..planner.plan import Plan
from ..planner.recipe import Recipe
from . import format  # noqa: A004
from .history import History, number
from .series import Series

Axis = Literal["step", "tokens", "time", "$"]
AXES: tuple[Axis, ...] = ("step", "tokens", "time", "$")
#: What a curve can show: figures of step events, the loss smoothed, and the held-out loss.
CURVES = ("loss", "mean loss", "held-out loss", "grad norm", "tokens/s")
#: Those whose spikes are marked where they leave the axis.
SPIKY = ("loss", "grad norm")
_STEP_FIELDS = {"loss": "loss", "grad norm": "grad_norm", "tokens/s": "tokens_per_s"}
#: Buckets of a method's own figures: there can be dozens of them, on four axes each.
_FURTHER_BUCKETS = 256
#: Times the planned figure from which on a percentage is hard to read.
_FAR_OFF = 10.0
#: Settings that differ in every pair of runs and mean nothing.
_IDLE = {"checkpoint_every", "eval_every", "warmup_steps", "gpus", "device"}


@dataclass
class Contender:
    """One run of a comparison, as far as its events were taken in."""

    run: Run
    plan: Plan | None
    recipe: Recipe | None
    history: History = field(default_factory=History)
    curves: dict[tuple[str, Axis], Series] = field(default_factory=dict)
    elapsed_s: float = 0.0
    """Seconds at work so far: time between attempts does not count."""
    status: Status = field(default_factory=Status)
    _last: float = math.nan

    @classmethod
    def of(cls, run: Run) -> Contender:
        """A run with nothing read yet; a plan or recipe that can't be read is left out."""
        plan = recipe = None
        with contextlib.suppress(RunError):
            plan, recipe = run.plan, run.recipe
        found = cls(run, plan, recipe)
        with contextlib.suppress(RunError):
            found.status = run.status
        return found

    @property
    def usd_per_h(self) -> float:
        """What its machine costs."""
        return self.plan.cost.usd_per_h if self.plan else 0.0

    def take(self, events: Iterable[Event]) -> None:
        """Take in what the run has said since the last time."""
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Take in one event."""
        self.history.apply(event)
        if event.type == "state" and event.data.get("state") == "preparing":
            self._last = event.time
        elif math.isfinite(self._last):
            self.elapsed_s += max(event.time - self._last, 0.0)
            self._last = event.time
        if event.type == "step":
            for name, key in _STEP_FIELDS.items():
                self._add(name, number(event.data.get(key)))
            self._add("mean loss", self.history.average.latest)
        elif event.type == "eval":
            self._add("held-out loss", number(event.data.get("loss")))
        elif event.type == "metrics":
            for name, value in (event.data.get("values") or {}).items():
                self._add(name, number(value), _FURTHER_BUCKETS)

    def further(self) -> list[str]:
        """Names of the method's own figures, those that one looks at first in front."""
        return self.history.telling_metrics()

    def _add(self, name: str, value: float, buckets: int = 2048) -> None:
        history = self.history
        places: dict[Axis, float] = {
            "step": history.step,
            "tokens": history.tokens,
            "time": self.elapsed_s,
            "$": self.elapsed_s * self.usd_per_h / 3600,
        }
        for axis, x in places.items():
            series = self.curves.get((name, axis))
            if series is None:
                series = self.curves[name, axis] = Series(buckets)
            series.append(x, value)

    def curve(self, name: str, axis: Axis) -> Series:
        """One curve; empty if the run has said nothing of it."""
        return self.curves.get((name, axis)) or Series()


def settings(contender: Contender) -> dict[str, str]:
    """What was decided for a run, as flat text: model, data and every resolved knob."""
    if contender.plan is None:
        return {}
    plan = contender.plan
    flat: dict[str, Any] = {"model": plan.model.name, "hardware": f"{plan.hardware.count} x {plan.hardware.gpu}"}
    if contender.recipe is not None:
        flat["data"] = ", ".join(source.path for source in contender.recipe.data)
    flat |= {key: value for key, value in dataclasses.asdict(plan.resolved).items() if key not in _IDLE}
    return {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in flat.items()}


def differences(contenders: Sequence[Contender]) -> list[tuple[str, list[str]]]:
    """The settings in which not all runs agree, each with its value per run; ``–`` where a run has none."""
    all_settings = [settings(contender) for contender in contenders]
    keys = list(dict.fromkeys(key for one in all_settings for key in one))
    rows = [(key, [one.get(key, "–") for one in all_settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def ending(contender: Contender) -> str:
    """A run's state in words, with why it ended and how far it came: ``✘ failed: oom, step 3/412``."""
    status, history = contender.status, contender.history
    glyph = format.STATE_GLYPHS.get(status.state, ("?", "?"))[0]
    cause = f": {status.cause}" if status.cause else ""
    steps = history.steps or (contender.plan.resolved.steps if contender.plan else 0)
    return f"{glyph} {status.state}{cause}, step {history.step:,}" + (f"/{steps:,}" if steps else "")


@dataclass(frozen=True)
class Outcome:
    """How a run came out; NaN is a figure that there is none of, memory is GiB."""

    loss: float
    held_out: float
    tokens_per_s: float
    planned_tokens_per_s: float
    peak_gib: float
    planned_gib: float
    elapsed_s: float
    planned_s: float
    usd: float


def outcome(contender: Contender) -> Outcome:
    """A run's figures beside those of its plan. Its speed is the median of its newest steps."""
    history, plan = contender.history, contender.plan
    return Outcome(
        loss=history.average.latest if history.average else math.nan,
        held_out=history.best_evaluation(),
        tokens_per_s=history.median_rate(),
        planned_tokens_per_s=plan.speed.tokens_per_s if plan else math.nan,
        peak_gib=max(history.reserved_gib.values(), default=math.nan),
        planned_gib=_planned_gib(plan) if plan else math.nan,
        elapsed_s=contender.elapsed_s,
        planned_s=plan.time_s if plan else math.nan,
        usd=contender.elapsed_s * contender.usd_per_h / 3600,
    )


def _planned_gib(plan: Plan) -> float:
    """What the run's own figure is held against: the process on a CPU, where no allocator keeps count."""
    return plan.memory.device_gib if plan.hardware.kind == "cpu" else plan.memory.reserved_gib


def outcome_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, list[str]]]:
    """The figures as text: label and one value per run, with the plan's figure behind the measured one."""

    def against(measured: float, planned: float, show: Callable[[float], str]) -> str:
        if not math.isfinite(measured) or not measured:
            return f"– (plan {show(planned)})" if math.isfinite(planned) else "–"
        off = measured / planned if math.isfinite(planned) and planned else math.nan
        if not math.isfinite(off):
            return show(measured)
        return f"{show(measured)} ({format.off(off) if off < _FAR_OFF else f'× {off:,.0f}'})"

    return [
        ("loss, mean", [format.loss(one.loss) if math.isfinite(one.loss) else "–" for one in outcomes]),
        ("held-out, best", [format.loss(one.held_out) if math.isfinite(one.held_out) else "–" for one in outcomes]),
        ("tokens/s", [against(one.tokens_per_s, one.planned_tokens_per_s, format.rate) for one in outcomes]),
        ("reserved", [against(one.peak_gib, one.planned_gib, format.gib) for one in outcomes]),
        ("time", [against(one.elapsed_s, one.planned_s, format.duration) for one in outcomes]),
        ("cost", [format.usd(one.usd) for one in outcomes]),
    ]
