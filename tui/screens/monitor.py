"""Monitor: one run from its start: curves, GPUs, words. It only reads files, so closing it never touches the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.timer import Timer

from ...engine.run import Run
from ...engine.status import LIVE_STATES, Status
from ...planner.errors import FinetuiError, RunError
from ...planner.plan import Plan
from .. import format  # noqa: A004
from ..alerts import Watchman
from ..follower import Follower, Update
from ..history import EMA_WEIGHT, EMA_WEIGHTS, History
from ..keys import Key, bindings
from ..machine_curves import FIGURES
from ..series import Series
from ..widgets.gpu_panel import GpuPanel
from ..widgets.line_chart import Curve, LineChart
from ..widgets.lines import Line, Span
from ..widgets.log_pane import LogPane
from ..widgets.run_details import NO_RUNS
from ..widgets.run_header import RunHeader, eta_text, state_span
from . import actions
from .base import BaseScreen
from .runs import RESUMABLE

#: Seconds between pictures: 1 Hz is what keeps the wire below 10 kB/s with eight GPUs.
FRAME_S = 1.0
#: Messages waiting for this screen above which the reader pauses.
_BACKLOG = 10
_LEARNING_RATE = "learning rate"


class MonitorScreen(BaseScreen):
    """One run."""

    SCOPE = "monitor"
    BINDINGS = bindings("monitor")

    @dataclass
    class Followed(Message):
        """There is something new about the run."""

        update: Update[History]

    @dataclass
    class Listed(Message):
        """The runs there are."""

        runs: list[Run]

    def __init__(self) -> None:
        super().__init__()
        self._run: Run | None = None
        self._plan: Plan | None = None
        self._status = Status()
        self._history = History()
        self._share = 1.0
        self._watchman = Watchman("")
        self._follower: Follower[History] | None = None
        self._frames: Timer | None = None
        self._changed = False
        self._seen = False
        self._runs: list[Run] = []
        self._figure = 0
        self._smoothing: float | None = EMA_WEIGHT
        self._at: float | None = None

    def body(self) -> ComposeResult:
        """Header, charts, GPUs, words."""
        yield RunHeader()
        with Horizontal(id="charts"):
            yield LineChart("loss", id="loss")
            with Vertical(id="small-charts"):
                yield LineChart("tokens/s", axis=False, id="rate")
                yield LineChart("grad norm", axis=False, id="grad-norm")
                yield LineChart(_LEARNING_RATE, axis=False, id="figure")
        yield GpuPanel()
        yield LogPane()

    def on_mount(self) -> None:
        """Start the clock of the pictures."""
        self._chart("loss").spikes = self._chart("grad-norm").spikes = False
        self._frames = self.set_interval(FRAME_S / self.owner.preferences.refresh_hz, self._frame, pause=True)

    def on_screen_resume(self) -> None:
        """Watch what the app says is watched; without any, the newest run."""
        super().on_screen_resume()
        self._seen = True
        self._find_runs()
        if self.owner.watched is not None and (self._run is None or self.owner.watched.path != self._run.path):
            self.watch_run(self.owner.watched)
        else:
            self._show()
        if self._frames is not None:
            self._frames.resume()

    def on_screen_suspend(self) -> None:
        """Nobody looks: don't draw. Reading goes on, because somebody may want to be called back."""
        self._seen = False
        if self._frames is not None:
            self._frames.pause()

    def on_unmount(self) -> None:
        """End the reading thread."""
        if self._follower is not None:
            self._follower.stop()

    def watch_run(self, run: Run) -> None:
        """Show this run from its start."""
        self._run = self.owner.watched = run
        try:
            self._plan = run.plan
        except RunError as error:
            self._plan = None
            self.notify(str(error), severity="warning")
        steps = self._plan.resolved.steps if self._plan else 0
        self._history, self._share, self._status, self._at = History(steps=steps), 1.0, Status(), None
        self._watchman = Watchman(run.name)
        if self._follower is not None:
            self._follower.stop()
        self._follower = Follower(
            run,
            lambda update: self.post_message(self.Followed(update)),
            begin=lambda: History(steps=steps),
            prepare=lambda: self.owner.backend.open(run),
            busy=lambda: self.message_queue_size > _BACKLOG,
        )
        self._follower.start()
        self._show()

    @on(Followed)
    def _followed(self, message: Followed) -> None:
        update = message.update
        if update.source is not self._follower:  # of a run that was watched before
            return
        if update.fold is not None:
            self._history = update.fold
        for event in update.events:
            self._history.apply(event)
        first = self._status.created == 0
        ended = self._status.state in LIVE_STATES and update.status.state not in LIVE_STATES
        self._status, self._share = update.status, update.share
        self._changed = True
        if update.caught_up:
            for alert in self._watchman.news(self._history, self._status):
                actions.announce(self.owner, alert, self._watchman.name, seen=self._seen)
        if self._seen and update.caught_up and (first or ended or update.fold is not None):
            self._show()

    @work(thread=True, exclusive=True, group="list", exit_on_error=False)
    def _find_runs(self) -> None:
        try:
            self.post_message(self.Listed(self.owner.backend.runs()))
        except FinetuiError as error:
            self.owner.notify(str(error), severity="error")

    @on(Listed)
    def _listed(self, message: Listed) -> None:
        self._runs = message.runs
        if self._run is None and self._runs:
            self.watch_run(self._runs[0])
        else:
            self._show()

    def keys_shown(self) -> list[Key]:
        """What can be done depends on whether the run is at work."""
        live = self._status.state in LIVE_STATES
        resumable = self._status.state in RESUMABLE
        fitting = {"stop": live, "checkpoint": live, "app.leave": live, "resume": resumable}
        fitting["switch(1)"] = len(self._runs) > 1
        fitting["figure(1)"] = len(self._figures()) > 1
        fitting["gpus"] = bool(self._history.gpus)
        keys = [key for key in super().keys_shown() if key.scope == "app" or fitting.get(key.action, True)]
        if self._run is None:
            return [key for key in super().keys_shown() if key.scope == "app" or key.action == "app.try_it"]
        return [key for key in keys if key.action != "app.try_it"]

    # --- drawing

    def _frame(self) -> None:
        live = self._status.state in LIVE_STATES
        if self._run is not None and (self._changed or live):
            self._show()

    def _show(self) -> None:
        self._changed = False
        history, now = self._history, self.owner.backend.now()
        live = self._status.state in LIVE_STATES
        total = float(history.steps)
        self.set_class(self._run is None, "-none")
        if self._run is None:
            self.query_one(RunHeader).show_nothing(NO_RUNS)
            self.refresh_bars()
            return
        name = self._run.name
        at = next((n for n, run in enumerate(self._runs, 1) if run.path == self._run.path), 0)
        place = f"{at} of {len(self._runs)}" if at and len(self._runs) > 1 else ""
        for chart in self.query(LineChart):
            chart.at = self._at
        with self.app.batch_update():
            self.query_one(RunHeader).show(name, history, self._status, self._plan, now, place, self._after())
            self._chart("loss").show(self._loss_curves(), self._loss_figures(), total, history.marks)
            rate, norm = history.tokens_per_s, history.grad_norm
            mfu = history.mfu(self._plan)
            use: Line = [(f"MFU {mfu:.0%}", "dim")] if math.isfinite(mfu) else []
            self._show_one("rate", rate, format.rate, total, use)
            self._show_one("grad-norm", norm, "{:.3g}".format, total)
            self._show_figure(total)
            gpus = [
                (gpu, now - history.gpu_times[index] if live else 0.0) for index, gpu in sorted(history.gpus.items())
            ]
            self.query_one(GpuPanel).show(gpus, history.host)
            self.query_one(LogPane).show(history, self._plan, self._status.elapsed_s(now), live=live)
            self.refresh_bars()

    def _after(self) -> str:
        """What can be done with the result, once there is one."""
        if self._run is None or self._status.state != "finished" or not self._run.output_path.exists():
            return ""
        return f"finetui chat {self._run.name}, finetui eval …, finetui export …"

    def _figures(self) -> list[str]:
        """What the last small chart can show: the method's own figures first, where it has any; the machine's last."""
        return [*self._history.telling_metrics(), _LEARNING_RATE, *self._history.machine.names()]

    def _show_figure(self, total: float) -> None:
        names, history = self._figures(), self._history
        name = names[self._figure % len(names)]
        show: Callable[[float], str] = "{:.2e}".format if name == _LEARNING_RATE else "{:.4g}".format
        series = history.metrics.get(name, history.learning_rate)
        if name in FIGURES and name not in history.metrics:
            series, show = history.machine.curves[name], FIGURES[name].shown
        self._chart("figure").label = name
        more: Line = [(f"({self._figure % len(names) + 1} of {len(names)})", "dim")] if len(names) > 1 else []
        self._show_one("figure", series, show, total, more)

    def _show_one(
        self, name: str, series: Series, show: Callable[[float], str], total: float, more: Sequence[Span] = ()
    ) -> None:
        """Draw a chart of one curve, its latest value and more of the title after it."""
        curves = [Curve(series, shown=show)] if series else []
        self._chart(name).show(curves, [*_latest(series.latest, show, bool(series)), *more], total)

    def _chart(self, name: str) -> LineChart:
        return self.query_one(f"#{name}", LineChart)

    def _loss_curves(self) -> list[Curve]:
        """The loss, thin below its mean; alone where nothing is smoothed; the held-out losses as points."""
        history, show = self._history, format.loss
        held_out = Curve(history.evaluation, "second", points=True, name="held-out", shown=show)
        if self._smoothing is None:
            return [Curve(history.loss, "accent", shown=show), held_out]
        mean = Curve(history.averages[self._smoothing], "accent", derived=True, name="mean", shown=show)
        return [Curve(history.loss, "trace", shown=show), mean, held_out]

    def _loss_figures(self) -> Line:
        history = self._history
        if not history.loss:
            return []
        latest = history.loss.latest
        figures: Line = [(format.loss(latest), "" if math.isfinite(latest) else "bad")]
        if self._share < 1:
            figures.append((f" sampled, {self._share:.0%} read", "warn"))
        if self._smoothing is not None and (mean := history.averages[self._smoothing]):
            over = f" over {1 / self._smoothing:.0f}" if self._smoothing != EMA_WEIGHT else ""
            figures.append((f" mean{over} {mean.latest:.4f}", "accent"))
        if history.evaluation:
            figures.append((f" held-out {format.loss(history.evaluation.latest)}", "second"))
        if better := history.better_evaluation():
            figures.append((f" lowest {format.loss(better[1])} at {better[0]:,.0f}", "second"))
        if history.not_finite:
            figures.insert(1, (f" ✘ {history.not_finite} not finite", "bad"))
        if (parts := self._chart("loss").parts) > 1:
            figures.insert(1, (f" newest 1/{parts:.0f}", "warn"))
        return figures

    def status_line(self) -> Line:
        """State, progress and loss in one line."""
        if self._run is None:
            return [(" no run", "dim")]
        history = self._history
        loss = f"  loss {format.loss(history.loss.latest)}" if history.loss else ""
        return [
            (" ", ""),
            state_span(self._status.state, self._status.cause),
            (f"  {history.step:,}/{history.steps:,}{loss}  {eta_text(history, self._status.state)}", ""),
        ]

    # --- keys

    def action_switch(self, direction: int) -> None:
        """Watch the next or the previous run."""
        paths = [run.path for run in self._runs]
        if len(paths) < 2 or self._run is None:
            self.notify("There is no other run.", severity="warning")
            return
        at = paths.index(self._run.path) if self._run.path in paths else 0
        self.watch_run(self._runs[(at + direction) % len(paths)])

    def action_log_scale(self) -> None:
        """Switch the loss between a linear and a logarithmic axis."""
        chart = self._chart("loss")
        chart.log_scale = not chart.log_scale
        chart.redraw()

    def action_smooth(self) -> None:
        """The next smoothing: a mean over about 10 steps, 50, none, 3."""
        order = [EMA_WEIGHT, *(weight for weight in reversed(EMA_WEIGHTS) if weight < EMA_WEIGHT), None]
        order += [weight for weight in EMA_WEIGHTS if weight > EMA_WEIGHT]
        self._smoothing = order[(order.index(self._smoothing) + 1) % len(order)]
        self._show()

    def action_zoom(self) -> None:
        """All of the run in the charts, its newest quarter, or its newest sixteenth."""
        for chart in self.query(LineChart):
            chart.zoom()
        self._show()

    def action_read(self, columns: int) -> None:
        """Read the curves off so many columns on, or back from the newest step."""
        self._at = self._chart("loss").beside(columns)
        self._show()

    @on(LineChart.Pointed)
    def _pointed(self, message: LineChart.Pointed) -> None:
        self._at = None if message.x == self._at else message.x
        self._show()

    def action_gpus(self) -> None:
        """The GPUs' other figures."""
        self.query_one(GpuPanel).toggle()

    def action_figure(self, direction: int = 1) -> None:
        """The next figure of the method or the machine in the last small chart, or the one before."""
        self._figure += direction
        self._show()

    def action_report(self) -> None:
        """Write the run's report into the current folder."""
        if self._run is not None:
            actions.report(self.owner, self._run)

    def action_view(self) -> None:
        """Next view of the pane below the charts."""
        self.query_one(LogPane).next_view()

    def action_stop(self) -> None:
        """Write a checkpoint and end the run."""
        if self._run is not None:
            actions.stop(self.owner, self._run)

    def action_kill(self) -> None:
        """End the run at once."""
        if self._run is not None:
            actions.kill(self.owner, self._run)

    def action_checkpoint(self) -> None:
        """Write a checkpoint."""
        if self._run is not None:
            actions.checkpoint(self.owner, self._run)

    def action_resume(self) -> None:
        """Go on from the last checkpoint."""
        if self._run is not None:
            actions.resume(self.owner, self._run)


def _latest(value: float, show: Callable[[float], str], known: bool) -> Line:
    if not known:
        return []
    return [(show(value) if math.isfinite(value) else str(value), "" if math.isfinite(value) else "bad")]
