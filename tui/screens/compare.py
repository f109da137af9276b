"""Compare: several runs on one chart, over steps, tokens, time or money; what differs, and who kept to their plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.timer import Timer

from ...engine.run import Run
from .. import format  # noqa: A004
from ..comparison import AXES, CURVES, SPIKY, Axis, Contender
from ..follower import Follower, Update
from ..keys import Key, bindings
from ..widgets.comparison_table import LETTERS, ROLES, ComparisonTable
from ..widgets.line_chart import Curve, LineChart
from ..widgets.lines import Line
from .base import BaseScreen

#: Seconds between pictures.
FRAME_S = 0.5
#: Messages waiting for this screen above which the reader pauses.
_BACKLOG = 10


def end_label(axis: Axis, end: float) -> str:
    """The right end of an axis in its unit."""
    if axis == "time":
        return format.duration(end)
    if axis == "$":
        return format.usd(end)
    return f"{format.count(end)} tokens" if axis == "tokens" else f"step {end:,.0f}"


class Differences(VerticalScroll, inherit_bindings=False):
    """Scrolls up and down, and leaves left and right to the chart above."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("up", "scroll_up", "Up"),
        ("down", "scroll_down", "Down"),
        ("pageup", "page_up", "Page up"),
        ("pagedown", "page_down", "Page down"),
    ]


class CompareScreen(BaseScreen):
    """Chart above, table below."""

    SCOPE = "compare"
    BINDINGS = bindings("compare")

    @dataclass
    class Chosen(Message):
        """These runs are compared from now on."""

        contenders: list[Contender]

    @dataclass
    class Followed(Message):
        """What the run at a place of the comparison has said since the last time."""

        place: int
        update: Update[Contender]

    def __init__(self) -> None:
        super().__init__()
        self._contenders: list[Contender] = []
        self._followers: list[Follower[Contender]] = []
        self._shares: list[float] = []
        self._unseen: set[int] = set()
        self._curve, self._axis = CURVES[0], AXES[0]
        self._frames: Timer | None = None
        self._changed = self._seen = False

    def body(self) -> ComposeResult:
        """Chart, table."""
        yield LineChart("", shortest=1e-9, id="overlay")
        with Differences(id="differences") as panel:
            panel.border_title = "outcome and settings"
            yield ComparisonTable()

    def on_mount(self) -> None:
        """Start the clock of the pictures."""
        self.query_one("#differences").focus()
        self._frames = self.set_interval(FRAME_S, self._frame, pause=True)

    def on_screen_resume(self) -> None:
        """Other runs may be marked now."""
        super().on_screen_resume()
        self._seen = True
        self._choose(tuple(self.owner.marked))
        if self._frames is not None:
            self._frames.resume()

    def on_screen_suspend(self) -> None:
        """Nobody looks."""
        self._seen = False
        if self._frames is not None:
            self._frames.pause()

    def on_unmount(self) -> None:
        """End the reading threads."""
        for follower in self._followers:
            follower.stop()

    @work(thread=True, exclusive=True, group="choose", exit_on_error=False)
    def _choose(self, marked: tuple[Run, ...]) -> None:
        runs = (marked or tuple(self.owner.backend.runs()[:2]))[: len(LETTERS)]
        if not self._followers or [run.path for run in runs] != [one.run.path for one in self._followers]:
            self.post_message(self.Chosen([Contender.of(run) for run in runs]))

    @on(Chosen)
    def _chosen(self, message: Chosen) -> None:
        for follower in self._followers:
            follower.stop()
        self._contenders = message.contenders
        self._shares = [1.0] * len(self._contenders)
        self._unseen = set(range(len(self._contenders)))
        self._followers = [self._follower(place, one) for place, one in enumerate(self._contenders)]
        for follower in self._followers:
            follower.start()
        self._show()

    def _follower(self, place: int, one: Contender) -> Follower[Contender]:
        return Follower(
            one.run,
            lambda update: self.post_message(self.Followed(place, update)),
            begin=lambda: Contender(one.run, one.plan, one.recipe),
            prepare=lambda: self.owner.backend.open(one.run),
            busy=lambda: not self._seen or self.message_queue_size > _BACKLOG,
        )

    @on(Followed)
    def _followed(self, message: Followed) -> None:
        update, place = message.update, message.place
        if place >= len(self._followers) or update.source is not self._followers[place]:  # of another comparison
            return
        if update.fold is not None:
            self._contenders[place] = update.fold
        self._contenders[place].take(update.events)
        self._contenders[place].status = update.status
        self._shares[place] = update.share
        self._changed = True
        if update.caught_up and place in self._unseen:  # the first picture does not wait for its turn
            self._unseen.discard(place)
            self._show()

    def _frame(self) -> None:
        if self._changed:
            self._show()

    def _show(self) -> None:
        self._changed = False
        chart = self.query_one(LineChart)
        curves = curves_of(self._contenders, self._curve, self._axis)
        chart.label, axis = self._curve, self._axis
        chart.spikes = self._curve not in SPIKY
        chart.end_label = lambda end: end_label(axis, end)
        figures: Line = [(f"over {axis}", "dim")]
        if chart.parts > 1:
            figures.append((f"newest 1/{chart.parts:.0f}", "warn"))
        if any(share < 1 for share in self._shares):
            figures.append((f"sampled, {min(self._shares):.0%} read", "warn"))
        for letter, role, contender in zip(LETTERS, ROLES, self._contenders, strict=False):
            figures.append((f"{letter} {contender.run.name}", role))
        chart.show(curves, figures, max((curve.series.last_x for curve in curves), default=0.0))
        self.query_one(ComparisonTable).show(self._contenders)
        self.refresh_bars()

    def keys_shown(self) -> list[Key]:
        """Without a run there is nothing to do here."""
        keys = super().keys_shown()
        if not self._contenders:
            return [key for key in keys if key.scope == "app" or key.action == "app.try_it"]
        return [key for key in keys if key.action != "app.try_it"]

    def status_line(self) -> Line:
        """Which runs."""
        return [(" compare " + ", ".join(contender.run.name for contender in self._contenders), "")]

    # --- keys

    def action_curve(self) -> None:
        """The next figure."""
        names = list(dict.fromkeys([*CURVES, *(name for one in self._contenders for name in one.further())]))
        self._curve = names[(names.index(self._curve) + 1) % len(names)] if self._curve in names else names[0]
        self._show()

    def action_axis(self) -> None:
        """The next axis."""
        self._axis = AXES[(AXES.index(self._axis) + 1) % len(AXES)]
        self.query_one(LineChart).at = None
        self._show()

    def action_zoom(self) -> None:
        """All of the axis, its newest quarter, or its newest sixteenth."""
        self.query_one(LineChart).zoom()
        self._show()

    def action_read(self, columns: int) -> None:
        """Read the curves off so many columns on, or back from the newest point."""
        chart = self.query_one(LineChart)
        chart.at = chart.beside(columns)
        chart.redraw()

    @on(LineChart.Pointed)
    def _pointed(self, message: LineChart.Pointed) -> None:
        chart = self.query_one(LineChart)
        chart.at = None if message.x == chart.at else message.x
        chart.redraw()

    def action_log_scale(self) -> None:
        """A logarithmic axis or a linear one."""
        chart = self.query_one(LineChart)
        chart.log_scale = not chart.log_scale
        chart.redraw()


def _shown_as(name: str) -> Callable[[float], str]:
    """How values of a curve are written."""
    if "loss" in name:
        return format.loss
    return format.rate if name == "tokens/s" else "{:.4g}".format


def curves_of(contenders: Sequence[Contender], name: str, axis: Axis) -> list[Curve]:
    """One curve per run that has said something of it, in the run's colour and with its letter."""
    found = []
    for letter, role, contender in zip(LETTERS, ROLES, contenders, strict=False):
        series = contender.curve(name, axis)
        if series:
            found.append(Curve(series, role, points=name == "held-out loss", label=letter, shown=_shown_as(name)))
    return found
