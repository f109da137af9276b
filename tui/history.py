"""History: what a run has said so far, folded from its events into what a screen shows.

Knows nothing of screens, and of runs only their events and their plan; one event at a time, in constant memory.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ..engine.events import Event
from ..planner.plan import Plan
from . import format  # noqa: A004
from .machine_curves import MachineCurves
from .series import Series

#: Steps at the start of a session that say nothing about its pace: compilation, caches, the allocator's growth.
SETTLING_STEPS = 3
#: Steps that the pace is taken from.
_PACE_STEPS = 256
#: Weights of the newest loss in the moving averages, from hardly smoothed to smooth.
EMA_WEIGHTS = (0.3, 0.1, 0.02)
#: The one that is shown unless the user asks for another.
EMA_WEIGHT = 0.1
#: Buckets of a further figure's curve: there can be dozens of them, and each is drawn small.
_FIGURE_BUCKETS = 512
#: Prompts whose answers are kept: a run that learns from rollouts tells thousands.
_ANSWERS = 64
#: How long without a step is worth a word: so many seconds, and so many times what a step takes.
_OVERDUE_S, _OVERDUE_STEPS = 30.0, 5.0
#: Marks kept per kind; of more, every other is forgotten.
_MARKS = 512


@dataclass(frozen=True)
class LogEntry:
    """One line for the log pane; ``kind`` is an event type."""

    time: float
    kind: str
    text: str


class StepEntry(NamedTuple):
    """A step as a line for the log pane; its words are made only for the few that are looked at."""

    time: float
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float

    @property
    def kind(self) -> str:
        """See :class:`LogEntry`."""
        return "step"

    @property
    def text(self) -> str:
        """See :class:`LogEntry`."""
        rate = format.rate(self.tokens_per_s) if math.isfinite(self.tokens_per_s) else "–"
        return (
            f"step {self.step}  loss {format.loss(self.loss)}  lr {self.learning_rate:.2e}"
            f"  grad norm {self.grad_norm:.3g}  {rate} tok/s"
        )


class Mark(NamedTuple):
    """Something that happened at a step and belongs on its curves; ``kind`` is an event type, or ``attempt``."""

    step: float
    kind: str


@dataclass
class Answer:
    """A held-out prompt with the model's first and latest answer to it."""

    prompt: str
    expected: str
    before: str
    after: str
    step: int


@dataclass
class History:
    """A run so far. Times are seconds since the epoch, memory is GiB, money is USD."""

    state: str = "preparing"
    cause: str | None = None
    message: str = ""
    do: str = ""
    attempt: int = 0
    phase: str = ""
    step: int = 0
    steps: int = 0
    epoch: float = 0.0
    tokens: int = 0
    checkpoint_step: int | None = None
    loss: Series = field(default_factory=Series)
    averages: dict[float, Series] = field(default_factory=lambda: {weight: Series() for weight in EMA_WEIGHTS})
    """The loss smoothed, by the weight of the newest one."""
    evaluation: Series = field(default_factory=Series)
    learning_rate: Series = field(default_factory=Series)
    grad_norm: Series = field(default_factory=Series)
    tokens_per_s: Series = field(default_factory=Series)
    metrics: dict[str, Series] = field(default_factory=dict)
    """Further figures of the method (rewards, margins, KL) under the trainer's names."""
    machine: MachineCurves = field(default_factory=MachineCurves)
    gpus: dict[int, dict] = field(default_factory=dict)
    gpu_times: dict[int, float] = field(default_factory=dict)
    host: dict = field(default_factory=dict)
    allocated_gib: dict[int, float] = field(default_factory=dict)
    """What each rank's allocator holds now."""
    peak_gib: dict[int, float] = field(default_factory=dict)
    """The most that each rank ever allocated, and below the most that it ever reserved."""
    reserved_gib: dict[int, float] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    marks: dict[str, list[Mark]] = field(default_factory=dict)
    """What happened on the way, by kind."""
    log: deque[LogEntry | StepEntry] = field(default_factory=lambda: deque(maxlen=400))
    logged: int = 0
    not_finite: int = 0
    last_time: float = 0.0
    step_time: float = 0.0
    """When the newest step ended; 0 without one."""
    _pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_PACE_STEPS))
    _settling: int = SETTLING_STEPS

    def apply(self, event: Event) -> None:
        """Take in one event; types of a later release are passed over."""
        if event.time > self.last_time:
            self.last_time = event.time
        handler = _HANDLERS.get(event.type)
        if handler is not None:
            handler(self, event.data, event.time)

    # --- what screens ask

    def eta_s(self) -> float:
        """Seconds to the last step at this session's pace, or NaN before there is one.

        The first steps of the session are left out, and so are those of earlier sessions: their machine may have been
        another one. Evaluations and checkpoints between steps count, because more of them will come.
        """
        if len(self._pace) < 2 or self.steps <= 0:
            return math.nan
        (start, first), (end, last) = self._pace[0], self._pace[-1]
        return max(self.steps - self.step, 0) * (end - start) / (last - first) if last > first else math.nan

    def overdue_s(self, now: float) -> float:
        """Seconds since the newest step of a run at work, where that is far longer than its steps take; else 0."""
        if not self.step_time or self.state != "running":
            return 0.0
        (start, first), (end, last) = (self._pace[0], self._pace[-1]) if self._pace else ((0.0, 0), (0.0, 0))
        usual = (end - start) / (last - first) if last > first else 0.0
        waited = now - self.step_time
        return waited if waited > max(_OVERDUE_S, _OVERDUE_STEPS * usual) else 0.0

    @property
    def average(self) -> Series:
        """The loss smoothed as it is shown unless the user asks for another."""
        return self.averages[EMA_WEIGHT]

    def mfu(self, plan: Plan | None) -> float:
        """Share of the devices' peak that useful arithmetic reaches now, or NaN: the plan's, by measured speed.

        The plan says how many FLOPs a token takes, so its MFU and its tokens/s are in the same proportion as any.
        """
        if plan is None or not plan.speed.tokens_per_s or not plan.speed.mfu:
            return math.nan
        return plan.speed.mfu * self.median_rate() / plan.speed.tokens_per_s

    def projected_usd(self, plan: Plan | None, elapsed_s: float) -> float:
        """What the run will have cost at its end, at this session's pace; NaN while there is none."""
        return self.cost_usd(plan, elapsed_s + self.eta_s())

    def cost_usd(self, plan: Plan | None, elapsed_s: float) -> float:
        """What was spent so far at the plan's price; 0 on hardware that is already there."""
        return plan.cost.usd_per_h * elapsed_s / 3600 if plan is not None else 0.0

    def median_rate(self) -> float:
        """Median tokens/s of the newest steps, or NaN."""
        rates = sorted(bucket.end for bucket in self.tokens_per_s.buckets[-64:] if bucket.count)
        return rates[len(rates) // 2] if rates else math.nan

    def telling_metrics(self) -> list[str]:
        """Names of the further figures, those that one looks at first in front."""
        return sorted(self.metrics, key=lambda name: (_rank(name), name))

    def best_evaluation(self) -> float:
        """The lowest held-out loss, or NaN."""
        return self.evaluation.lowest

    def better_evaluation(self) -> tuple[float, float] | None:
        """The step of the lowest held-out loss, and that loss, where a later one is higher; else None."""
        lowest = self.evaluation.lowest
        return (self.evaluation.lowest_x, lowest) if self.evaluation.latest > lowest else None

    # --- events

    def _say(self, time: float, kind: str, text: str) -> None:
        self.log.append(LogEntry(time, kind, text))
        self.logged += 1

    def _mark(self, kind: str, step: float | None = None) -> None:
        marks = self.marks.setdefault(kind, [])
        marks.append(Mark(self.step if step is None else step, kind))
        if len(marks) > _MARKS:
            del marks[1:-1:2]

    def _on_state(self, data: dict, time: float) -> None:
        self.state, self.cause = data.get("state", "?"), data.get("cause")
        self.message, self.do = data.get("message", ""), data.get("do", "")
        if data.get("attempt", self.attempt) != self.attempt:
            if self.attempt and self.step:
                self._mark("attempt")
            self.attempt, self._settling = data["attempt"], SETTLING_STEPS
            self._pace.clear()
        text = self.state + (f" ({self.cause})" if self.cause else "")
        self._say(time, "state", f"{text}: {self.message}" if self.message else text)

    def _on_step(self, data: dict, time: float) -> None:
        step = int(data.get("step", 0))
        self.step, self.steps = step, int(data.get("steps") or self.steps)
        self.epoch, self.tokens = data.get("epoch", 0.0), int(data.get("tokens", 0))
        self.phase, self.step_time = "", time
        self.machine.step(step)
        if self._settling > 0:
            self._settling -= 1
        else:
            self._pace.append((time, step))
        loss, grad_norm = number(data.get("loss")), number(data.get("grad_norm"))
        finite = math.isfinite(loss)
        self.loss.append(step, loss)
        for wanted, series in self.averages.items():
            if finite:
                before = series.latest
                # Early on, the plain mean: an average that starts at the first loss would lag behind at first.
                weight = max(wanted, 1 / max(step, 1))
                series.append(step, loss if math.isnan(before) else before + weight * (loss - before))
        if not (finite and math.isfinite(grad_norm)):
            self.not_finite += 1
            self._mark("nan")
        learning_rate, rate = number(data.get("learning_rate")), number(data.get("tokens_per_s"))
        self.learning_rate.append(step, learning_rate)
        self.grad_norm.append(step, grad_norm)
        self.tokens_per_s.append(step, rate)
        self.log.append(StepEntry(time, step, loss, learning_rate, grad_norm, rate))
        self.logged += 1

    def _on_eval(self, data: dict, time: float) -> None:
        loss = number(data.get("loss"))
        self.evaluation.append(int(data.get("step", 0)), loss)
        self._say(time, "eval", f"held-out loss {format.loss(loss)} after step {data.get('step', 0)}")

    def _on_metrics(self, data: dict, time: float) -> None:
        step = int(data.get("step", 0))
        for name, value in (data.get("values") or {}).items():
            series = self.metrics.get(name)
            if series is None:
                series = self.metrics[name] = Series(_FIGURE_BUCKETS)
            series.append(step, number(value))

    def _on_memory(self, data: dict, time: float) -> None:
        rank = int(data.get("rank", 0))
        self.allocated_gib[rank] = number(data.get("allocated_gib"))
        self.peak_gib[rank] = max(number(data.get("peak_gib")), self.peak_gib.get(rank, 0.0))
        self.reserved_gib[rank] = max(number(data.get("reserved_gib")), self.reserved_gib.get(rank, 0.0))

    def _on_gpu(self, data: dict, time: float) -> None:
        index = int(data.get("index", 0))
        self.gpus[index], self.gpu_times[index] = {**self.gpus.get(index, {}), **data}, time

    def _on_host(self, data: dict, time: float) -> None:
        self.host = data
        self.machine.read(self.gpus.values(), data)

    def _on_phase(self, data: dict, time: float) -> None:
        total, detail = data.get("total", 0), data.get("detail", "")
        share = f" {data.get('done', 0):,} of {total:,}" if total else ""
        text = f"{data.get('phase', '')}{share}" + (f": {detail}" if detail else "")
        if text and text != self.phase:
            self._say(time, "phase", text)
        self.phase = text

    def _on_checkpoint(self, data: dict, time: float) -> None:
        self.checkpoint_step = int(data.get("step", 0))
        self._mark("checkpoint", self.checkpoint_step)
        size, seconds = format.gib(data.get("bytes", 0) / 2**30), format.duration(data.get("seconds", 0))
        self._say(time, "checkpoint", f"checkpoint at step {self.checkpoint_step}  {size} in {seconds}")

    def _on_fallback(self, data: dict, time: float) -> None:
        self._mark("fallback")
        self._say(time, "fallback", f"{data.get('what', '')}: {data.get('why', '')}")

    def _on_warning(self, data: dict, time: float) -> None:
        self._mark("warning")
        where = f"{data['where']}: " if data.get("where") else ""
        self._say(time, "warning", f"{where}{data.get('what', '')}. {data.get('do', '')}".rstrip(". ") + ".")

    def _on_log(self, data: dict, time: float) -> None:
        self._say(time, "log", str(data.get("line", "")))

    def _on_failure(self, data: dict, time: float) -> None:
        self._mark("failure")
        self._say(time, "failure", f"rank {data.get('rank', 0)}: {data.get('message', '')}")

    def _on_sample(self, data: dict, time: float) -> None:
        prompt, answer, step = data.get("prompt", ""), data.get("answer", ""), int(data.get("step", 0))
        known = self.answers.get(prompt)
        if known is None:
            while len(self.answers) >= _ANSWERS:
                del self.answers[next(iter(self.answers))]
            self.answers[prompt] = Answer(prompt, data.get("expected", ""), answer, answer, step)
        else:
            known.after, known.step = answer, step


_HANDLERS = {name.removeprefix("_on_"): handler for name, handler in vars(History).items() if name.startswith("_on_")}
#: What one looks at first, by what the name holds: whether answers get better, and whether the model drifts away.
_TELLING = ("accuracies", "reward", "margins", "kl", "accuracy", "entropy")


def _rank(name: str) -> int:
    last = name.rpartition("/")[2]
    for rank, word in enumerate(_TELLING):
        if last == word or name == word:
            return rank
    return len(_TELLING) + any(part in ("eval", "std") for part in name.replace("_", "/").split("/"))


def number(value: object) -> float:
    """A figure of an event; one that is missing or no number is NaN."""
    return float(value) if isinstance(value, int | float) else math.nan
