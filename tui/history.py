"""History: what a run has said so far, folded from its events into what a screen shows.

Knows nothing of screens, and of runs only their events and their plan; one event at a time, in constant memory.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from ..engine.events import Event
from ..planner.plan import Plan
from . import format  # noqa: A004
from .series import Series

#: Steps at the start of a session that say nothing about its pace: compilation, caches, the allocator's growth.
SETTLING_STEPS = 3
#: Steps that the pace is taken from.
_PACE_STEPS = 256
#: Weight of the newest loss in the moving average.
EMA_WEIGHT = 0.1


@dataclass(frozen=True)
class LogEntry:
    """One line for the log pane; ``kind`` is an event type."""

    time: float
    kind: str
    text: str


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
    average: Series = field(default_factory=Series)
    evaluation: Series = field(default_factory=Series)
    learning_rate: Series = field(default_factory=Series)
    grad_norm: Series = field(default_factory=Series)
    tokens_per_s: Series = field(default_factory=Series)
    metrics: dict[str, Series] = field(default_factory=dict)
    """Further figures of the method (rewards, margins, KL) under the trainer's names."""
    gpus: dict[int, dict] = field(default_factory=dict)
    gpu_times: dict[int, float] = field(default_factory=dict)
    host: dict = field(default_factory=dict)
    peak_gib: dict[int, float] = field(default_factory=dict)
    reserved_gib: dict[int, float] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    log: deque[LogEntry] = field(default_factory=lambda: deque(maxlen=400))
    logged: int = 0
    not_finite: int = 0
    last_time: float = 0.0
    _pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_PACE_STEPS))
    _settling: int = SETTLING_STEPS

    def apply(self, event: Event) -> None:
        """Take in one event; types of a later release are passed over."""
        self.last_time = max(self.last_time, event.time)
        handler = getattr(self, f"_on_{event.type}", None)
        if handler is not None:
            handler(event.data, event.time)

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

    # --- events

    def _say(self, time: float, kind: str, text: str) -> None:
        self.log.append(LogEntry(time, kind, text))
        self.logged += 1

    def _on_state(self, data: dict, time: float) -> None:
        self.state, self.cause = data.get("state", "?"), data.get("cause")
        self.message, self.do = data.get("message", ""), data.get("do", "")
        if data.get("attempt", self.attempt) != self.attempt:
            self.attempt, self._settling = data["attempt"], SETTLING_STEPS
            self._pace.clear()
        text = self.state + (f" ({self.cause})" if self.cause else "")
        self._say(time, "state", f"{text}: {self.message}" if self.message else text)

    def _on_step(self, data: dict, time: float) -> None:
        step = int(data.get("step", 0))
        self.step, self.steps = step, int(data.get("steps") or self.steps)
        self.epoch, self.tokens = data.get("epoch", 0.0), int(data.get("tokens", 0))
        self.phase = ""
        if self._settling > 0:
            self._settling -= 1
        else:
            self._pace.append((time, step))
        loss = number(data.get("loss"))
        grad_norm = number(data.get("grad_norm"))
        before = self.average.latest if self.average else math.nan
        self.loss.append(step, loss)
        if math.isfinite(loss):
            # Early on, the plain mean: an average that starts at the first loss would lag behind for 1 / weight steps.
            weight = max(EMA_WEIGHT, 1 / max(step, 1))
            self.average.append(step, loss if math.isnan(before) else before + weight * (loss - before))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.not_finite += 1
        self.learning_rate.append(step, number(data.get("learning_rate")))
        self.grad_norm.append(step, grad_norm)
        self.tokens_per_s.append(step, number(data.get("tokens_per_s")))
        rate = number(data.get("tokens_per_s"))
        self._say(
            time,
            "step",
            f"step {step}  loss {format.loss(loss)}  lr {number(data.get('learning_rate')):.2e}"
            f"  grad norm {grad_norm:.3g}  {format.rate(rate) if math.isfinite(rate) else '–'} tok/s",
        )

    def _on_eval(self, data: dict, time: float) -> None:
        loss = number(data.get("loss"))
        self.evaluation.append(int(data.get("step", 0)), loss)
        self._say(time, "eval", f"held-out loss {format.loss(loss)} after step {data.get('step', 0)}")

    def _on_metrics(self, data: dict, time: float) -> None:
        step = int(data.get("step", 0))
        for name, value in (data.get("values") or {}).items():
            self.metrics.setdefault(name, Series()).append(step, number(value))

    def _on_memory(self, data: dict, time: float) -> None:
        rank = int(data.get("rank", 0))
        self.peak_gib[rank] = max(number(data.get("peak_gib")), self.peak_gib.get(rank, 0.0))
        self.reserved_gib[rank] = max(number(data.get("reserved_gib")), self.reserved_gib.get(rank, 0.0))

    def _on_gpu(self, data: dict, time: float) -> None:
        index = int(data.get("index", 0))
        self.gpus[index], self.gpu_times[index] = data, time

    def _on_host(self, data: dict, time: float) -> None:
        self.host = data

    def _on_phase(self, data: dict, time: float) -> None:
        total, detail = data.get("total", 0), data.get("detail", "")
        share = f" {data.get('done', 0):,} of {total:,}" if total else ""
        text = f"{data.get('phase', '')}{share}" + (f": {detail}" if detail else "")
        if text and text != self.phase:
            self._say(time, "phase", text)
        self.phase = text

    def _on_checkpoint(self, data: dict, time: float) -> None:
        self.checkpoint_step = int(data.get("step", 0))
        size, seconds = format.gib(data.get("bytes", 0) / 2**30), format.duration(data.get("seconds", 0))
        self._say(time, "checkpoint", f"checkpoint at step {self.checkpoint_step}  {size} in {seconds}")

    def _on_fallback(self, data: dict, time: float) -> None:
        self._say(time, "fallback", f"{data.get('what', '')}: {data.get('why', '')}")

    def _on_warning(self, data: dict, time: float) -> None:
        where = f"{data['where']}: " if data.get("where") else ""
        self._say(time, "warning", f"{where}{data.get('what', '')}. {data.get('do', '')}".rstrip(". ") + ".")

    def _on_log(self, data: dict, time: float) -> None:
        self._say(time, "log", str(data.get("line", "")))

    def _on_failure(self, data: dict, time: float) -> None:
        self._say(time, "failure", f"rank {data.get('rank', 0)}: {data.get('message', '')}")

    def _on_sample(self, data: dict, time: float) -> None:
        prompt, answer, step = data.get("prompt", ""), data.get("answer", ""), int(data.get("step", 0))
        known = self.answers.get(prompt)
        if known is None:
            self.answers[prompt] = Answer(prompt, data.get("expected", ""), answer, answer, step)
        else:
            known.after, known.step = answer, step


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
