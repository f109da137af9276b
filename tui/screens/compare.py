"""Compare: several runs on one chart, over steps, tokens, time or money; what differs, and who kept to their plan."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.message import Message

from ...engine.events import Event, EventReader
from ...engine.run import Run
from .. import format  # noqa: A004
from ..comparison import AXES, CURVES, Axis, Contender
from ..follower import BATCH
from ..keys import bindings
from ..widgets.comparison_table import LETTERS, ROLES, ComparisonTable
from ..widgets.line_chart import Curve, LineChart
from ..widgets.lines import Line
from .base import BaseScreen

#: Seconds between looks at the runs' files.
SCAN_S = 1.0
#: Messages waiting for this screen above which the reader pauses.
_BACKLOG = 10


def end_label(axis: Axis, end: float) -> str:
    """The right end of an axis in its unit."""
    if axis == "time":
        return format.duration(end)
    if axis == "$":
        return format.usd(end)
    return f"{format.count(end)} tokens" if axis == "tokens" else f"step {end:,.0f}"


class CompareScreen(BaseScreen):
    """Chart above, table below."""

    SCOPE = "compare"
    BINDINGS = bindings("compare")

    @dataclass
    class Chosen(Message):
        """These runs are compared from now on."""

        contenders: list[Contender]

    @dataclass
    class Read(Message):
        """What the runs have said since the last time."""

        read: list[tuple[Contender, list[Event]]]

    def __init__(self) -> None:
        super().__init__()
        self._contenders: list[Contender] = []
        self._wanted: tuple[Run, ...] | None = None
        self._curve, self._axis = CURVES[0], AXES[0]
        self._ended, self._seen = threading.Event(), threading.Event()

    def body(self) -> ComposeResult:
        """Chart, table."""
        yield LineChart("", shortest=1e-9, id="overlay")
        with VerticalScroll(id="differences") as panel:
            panel.border_title = "outcome and settings"
            yield ComparisonTable()

    def on_mount(self) -> None:
        """Begin to read."""
        self.query_one("#differences").focus()
        threading.Thread(target=self._follow, daemon=True, name="compare runs").start()

    def on_screen_resume(self) -> None:
        """Other runs may be marked now."""
        super().on_screen_resume()
        self._wanted = tuple(self.owner.marked)
        self._seen.set()

    def on_screen_suspend(self) -> None:
        """Nobody looks."""
        self._seen.clear()

    def on_unmount(self) -> None:
        """End the reading thread."""
        self._ended.set()
        self._seen.set()

    def _follow(self) -> None:
        wanted: tuple[Run, ...] | None = None
        readers: list[tuple[Contender, EventReader]] = []
        while self._seen.wait() and not self._ended.is_set():
            if self.message_queue_size > _BACKLOG:
                self._ended.wait(0.05)
                continue
            runs = self._wanted or tuple(self.owner.backend.runs()[:2])
            if wanted is None or [run.path for run in runs] != [run.path for run in wanted]:
                wanted = runs
                readers = [(Contender.of(run), EventReader(run.events_path)) for run in runs[: len(LETTERS)]]
                self.post_message(self.Chosen([contender for contender, _ in readers]))
            read = [(contender, reader.read(BATCH)) for contender, reader in readers]
            if any(events for _, events in read):
                self.post_message(self.Read(read))
            self._ended.wait(0.02 if any(len(events) == BATCH for _, events in read) else SCAN_S)

    @on(Chosen)
    def _chosen(self, message: Chosen) -> None:
        self._contenders = message.contenders
        self._show()

    @on(Read)
    def _read(self, message: Read) -> None:
        for contender, events in message.read:
            contender.take(events)
        self._show()

    def _show(self) -> None:
        chart = self.query_one(LineChart)
        curves = curves_of(self._contenders, self._curve, self._axis)
        chart.label, axis = self._curve, self._axis
        chart.end_label = lambda end: end_label(axis, end)
        figures: Line = [(f"over {axis}", "dim")]
        for letter, role, contender in zip(LETTERS, ROLES, self._contenders, strict=False):
            figures.append((f"{letter} {contender.run.name}", role))
        chart.show(curves, figures, max((curve.series.last_x for curve in curves), default=0.0))
        self.query_one(ComparisonTable).show(self._contenders)
        self.refresh_bars()

    def status_line(self) -> Line:
        """Which runs."""
        return [(" compare " + ", ".join(contender.run.name for contender in self._contenders), "")]

    # --- keys

    def action_curve(self) -> None:
        """The next figure."""
        self._curve = CURVES[(CURVES.index(self._curve) + 1) % len(CURVES)]
        self._show()

    def action_axis(self) -> None:
        """The next axis."""
        self._axis = AXES[(AXES.index(self._axis) + 1) % len(AXES)]
        self._show()

    def action_log_scale(self) -> None:
        """A logarithmic axis or a linear one."""
        chart = self.query_one(LineChart)
        chart.log_scale = not chart.log_scale
        chart.redraw()


def curves_of(contenders: Sequence[Contender], name: str, axis: Axis) -> list[Curve]:
    """One curve per run that has said something of it, in the run's colour and with its letter."""
    found = []
    for letter, role, contender in zip(LETTERS, ROLES, contenders, strict=False):
        series = contender.curve(name, axis)
        if series:
            found.append(Curve(series, role, points=name == "held-out loss", label=letter))
    return found
