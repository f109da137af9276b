"""LineChart: curves in braille, 2 x 4 dots per cell.

Each column shows the range from the smallest to the largest value that falls into it, so that no spike is lost; one
that would flatten all the rest may leave the axis, with a mark where it does. A value that is not finite leaves a gap
and a cross on the baseline. What happened on the way (checkpoints, warnings) stands in a line of its own below the
curves. The right end of the x axis is the whole run divided by a power of two: it stands still while the run grows into
it, and so do the columns already drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from textual.events import Click
from textual.message import Message

from ..axes import SHORTEST_AXIS, Scale, axis_end, latest_part, scale_of, tick, ticks
from ..history import Mark
from ..reading import beside, nearest, told, value_at
from ..series import Bucket, Series
from .lines import Line, Lines, Span

#: Bit of each dot in a braille cell, by column (0, 1) and row from the top (0 to 3): Unicode block U+2800.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


@dataclass(frozen=True)
class Curve:
    """A series and how it is drawn.

    ``role`` is its colour; ``points`` draws a mark per value instead of a line; ``label``, one character, stands at
    its newest value, so that curves can be told apart without colours. ``derived`` ones, such as a mean, have no say
    in what the axis leaves out, and are drawn as far as they lie on it. ``name`` and ``shown`` are how a value that is
    read off is told.
    """

    series: Series
    role: str = "accent"
    points: bool = False
    label: str = ""
    derived: bool = False
    name: str = ""
    shown: Callable[[float], str] = "{:.4g}".format


def scale_for(curves: Sequence[Curve], *, log: bool = False, spikes: bool = True) -> Scale | None:
    """A y axis for these curves, as :func:`scale_of`."""
    given = [curve for curve in curves if spikes or not curve.derived]
    return scale_of([curve.series for curve in given], log=log, spikes=spikes)


def plot(
    curves: Sequence[Curve],
    width: int,
    height: int,
    scale: Scale,
    end: float,
    start: float = 0.0,
    at: float | None = None,
) -> list[Line]:
    """The curves as ``height`` lines of ``width`` cells; of two in one cell, the later one is seen.

    Args:
        at: an x that is read off: a line stands there, behind the curves.
    """
    cells = [[0] * width for _ in range(height)]
    roles = [[""] * width for _ in range(height)]
    rows = height * 4

    owners: list[list[Curve | None]] = [[None] * width for _ in range(height)]
    labels: list[dict[int, Span]] = [{} for _ in range(height)]

    def dot(x: int, y: int, curve: Curve, role: str = "") -> None:
        if owners[y // 4][x // 2] is not curve:  # a thin line stays thin inside the band of an earlier curve
            cells[y // 4][x // 2], owners[y // 4][x // 2] = 0, curve
        cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
        roles[y // 4][x // 2] = role or curve.role

    def row(value: float) -> int:
        return round((1 - scale.place(value)) * (rows - 1))

    for curve in curves:
        before: tuple[int, int] | None = None
        for x, bucket in enumerate(curve.series.columns(start, end, width * 2)):
            if bucket is None:
                continue
            if bucket.broken:
                labels[height - 1][x // 2] = ("×", "bad")
            beyond = bucket.high > scale.high and math.isfinite(scale.beyond)
            if beyond and not curve.derived:
                labels[0][x // 2] = ("▲", "warn")
            left_out = (beyond or curve.derived) and bucket.low > scale.high
            if not bucket.count or left_out or (curve.derived and bucket.high < scale.low):
                before = None
                continue
            if before is not None and not curve.points and not bucket.broken:
                for point in _between(before, (x, row(_entry(bucket)))):
                    dot(*point, curve)
            for y in range(row(bucket.high), row(bucket.low) + 1):
                dot(x, y, curve)
            if curve.points:
                for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                    if 0 <= x + dx < width * 2 and 0 <= row(bucket.end) + dy < rows:
                        dot(x + dx, row(bucket.end) + dy, curve)
            before = None if bucket.broken else (x, row(bucket.end))
        if curve.label and before is not None:
            labels[before[1] // 4][before[0] // 2] = (curve.label, curve.role)
    if at is not None and start <= at <= end:
        column = round((at - start) / (end - start) * (width * 2 - 1)) // 2
        for y in range(height):
            if not cells[y][column]:
                labels[y].setdefault(column, ("│", "key"))
    return [runs_of_one_style(cells[y], roles[y], labels[y]) for y in range(height)]


#: How what happened is drawn, the most telling last: it is seen where several fall into one cell.
MARKS: dict[str, Span] = {
    "checkpoint": ("◆", "good"),
    "attempt": ("▸", "accent"),
    "fallback": ("!", "warn"),
    "warning": ("!", "warn"),
    "nan": ("×", "bad"),
    "failure": ("✘", "bad"),
}


def mark_line(marks: Mapping[str, Sequence[Mark]], width: int, end: float, start: float = 0.0) -> Line:
    """What happened between x = ``start`` and ``end``, each in its column; nothing if nothing did."""
    placed: dict[int, Span] = {}
    for kind, span in MARKS.items():
        steps = [mark.step for mark in marks.get(kind, ()) if start <= mark.step <= end]
        columns = {round((step - start) / (end - start) * (width * 2 - 1)) // 2 for step in steps}
        if kind != "checkpoint" or len(columns) <= width // 3:  # as many as that say only that there are many
            placed |= dict.fromkeys(columns, span)
    return runs_of_one_style([0] * width, [""] * width, placed) if placed else []


def _entry(bucket: Bucket) -> float:
    return bucket.end if bucket.count == 1 else (bucket.low + bucket.high) / 2


def _between(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The dots of a straight line between two dots, both included."""
    (x0, y0), (x1, y1) = start, end
    steps = max(abs(x1 - x0), abs(y1 - y0), 1)
    for n in range(steps + 1):
        yield round(x0 + (x1 - x0) * n / steps), round(y0 + (y1 - y0) * n / steps)


def runs_of_one_style(cells: list[int], roles: list[str], labels: Mapping[int, Span] = MappingProxyType({})) -> Line:
    """One row as few runs of one style; empty cells join the run before them, ``labels`` replace single cells."""
    line: Line = []
    text, role = "", ""
    for x, (cell, wanted) in enumerate(zip(cells, roles, strict=True)):
        character = chr(0x2800 + cell) if cell else " "
        if x in labels:
            character, wanted = labels[x]
        drawn = character != " "
        if drawn and wanted != role and text:
            line.append((text, role))
            text = ""
        if drawn:
            role = wanted
        text += character
    return [*line, (text, role)]


#: Of so many parts of the x axis the newest is shown.
_PARTS = (1.0, 4.0, 16.0)


class LineChart(Lines):
    """Curves under a title that carries their latest values.

    Args:
        label: what is drawn, for the title and for when there is nothing yet.
        axis: whether to label the y axis, which costs six columns.
        shortest: the fewest x units that the axis spans.
    """

    TITLED = True

    def __init__(
        self,
        label: str,
        *,
        axis: bool = True,
        shortest: float = SHORTEST_AXIS,
        id: str | None = None,  # noqa: A002
    ) -> None:
        super().__init__(id=id)
        self.label = label
        self.end_label: Callable[[float], str] = lambda end: f"step {end:,.0f}"
        """What stands at the right end of the x axis."""
        self._shortest = shortest
        self._axis = axis
        self._curves: Sequence[Curve] = ()
        self._figures: Line = []
        self._total = 0.0
        self._marks: Mapping[str, Sequence[Mark]] = {}
        self.log_scale = False
        self.parts = 1.0
        """Only the newest of so many parts of the x axis is shown."""
        self.at: float | None = None
        """The x whose values the title tells; None for the latest."""
        self.spikes = True
        """Whether a linear axis holds spikes; without, they are marked where they leave it."""

    def show(
        self, curves: Sequence[Curve], figures: Line, total: float, marks: Mapping[str, Sequence[Mark]] | None = None
    ) -> None:
        """Draw curves.

        Args:
            curves: later ones are drawn over earlier ones.
            figures: what follows the name in the title.
            total: the x at which the run will end.
            marks: what happened on the way, by kind; needs a labelled chart of seven lines.
        """
        self._curves, self._figures, self._total, self._marks = curves, figures, total, marks or {}
        self.redraw()

    def zoom(self) -> None:
        """Show all of the x axis, its newest quarter, or its newest sixteenth."""
        self.parts = _PARTS[(_PARTS.index(self.parts) + 1) % len(_PARTS)]

    def _shown(self) -> tuple[Sequence[Curve], float, float]:
        """The curves as far as they are shown, and the ends of the x axis."""
        last = max((curve.series.last_x for curve in self._curves), default=0.0)
        end = axis_end(last, self._total, self._shortest)
        if self.parts <= 1:
            return self._curves, 0.0, end
        start, end = latest_part(last, end, self.parts)
        return [replace(curve, series=curve.series.since(start)) for curve in self._curves], start, end

    # --- reading values off

    class Pointed(Message):
        """Somebody points at an x of the chart."""

        def __init__(self, x: float) -> None:
            super().__init__()
            self.x = x

    def beside(self, columns: int) -> float | None:
        """The x to read next, so many columns on from :attr:`at` or back; None where reading ends."""
        curves, start, end = self._shown()
        cells = max(self.size.width - 4 - self._labels(self.size.width - 4, self.size.height - 2), 2)
        return beside([curve.series for curve in curves], self.at, columns * (end - start) / cells)

    def on_click(self, event: Click) -> None:
        """Read off what is under the pointer."""
        curves, start, end = self._shown()
        left = 2 + self._labels(self.size.width - 4, self.size.height - 2)
        share = (event.x - left) / max(self.size.width - 3 - left, 1)
        x = nearest([curve.series for curve in curves], start + share * (end - start))
        if x is not None and -0.05 <= share <= 1.05:
            self.post_message(self.Pointed(x))

    def _readings(self) -> Line:
        """The values at :attr:`at`; nothing where that is not in the picture."""
        curves, start, end = self._shown()
        if self.at is None or not start <= self.at <= end:
            return []
        line: Line = [(f"at {self.end_label(self.at)}", "key")] if self._axis else []
        for curve in curves:
            found = value_at(curve.series, self.at)
            if found is not None:
                name = f"{curve.label or curve.name} ".lstrip()
                line.append((f"{name}{told(found, curve.shown)}", "" if curve.role == "trace" else curve.role))
        return line

    def title(self, width: int) -> Line:
        """The name and the latest figures, or those that are read off, as many as fit."""
        line: Line = [(self.label, "bold")]
        room = width - len(self.label)
        scale = scale_for(self._shown()[0], log=self.log_scale, spikes=self.spikes)
        beyond: Line = [(f"▲ to {tick(scale.beyond)}", "warn")] if scale and math.isfinite(scale.beyond) else []
        for text, role in self._readings() or [*self._figures, *beyond]:
            if len(text) + 1 > room:
                break
            line.append((f" {text}", role))
            room -= len(text) + 1
        return line

    def _labels(self, width: int, height: int) -> int:
        """Cells that the labels of the y axis take."""
        return 7 if self._axis and width >= 30 and height >= 3 else 0

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        curves, start, end = self._shown()
        scale = scale_for(curves, log=self.log_scale, spikes=self.spikes)
        if height < 1 or width < 4:
            return []
        if scale is None:
            return [[] for _ in range((height - 1) // 2)] + [[("no steps yet".center(width)[:width], "dim")]]
        labels = self._labels(width, height)
        axis = 1 if labels and height >= 6 else 0
        marked = mark_line(self._marks, width - labels, end, start) if axis and height >= 7 else []
        rows = plot(curves, width - labels, height - axis - bool(marked), scale, end, start, self.at)
        if not labels:
            return rows
        named = ticks(scale, len(rows))
        lines: list[Line] = []
        for y, row in enumerate(rows):
            label = tick(named[y])[:6].rjust(6) if y in named else " " * 6
            lines.append([(f"{label}{'┤' if y in named else '│'}", "dim"), *row])
        if marked:
            lines.append([(" " * labels, ""), *marked])
        if axis:
            right = self.end_label(end) + (" (log)" if scale.log else "")
            left = self.end_label(start).removeprefix("step ") if start else "0"
            lines.append([(" " * labels + left.ljust(width - labels - len(right)) + right, "dim")])
        return lines
