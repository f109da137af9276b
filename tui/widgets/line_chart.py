"""LineChart: curves in braille, 2 x 4 dots per cell.

Each column shows the range from the smallest to the largest value that falls into it, so that no spike is lost. A
value that is not finite leaves a gap and a mark on the baseline. The right end of the x axis is the whole run divided
by a power of two: it stands still while the run grows into it, and so do the columns already drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..series import Bucket, Series
from .lines import Line, Lines, Span

#: Bit of each dot in a braille cell, by column (0, 1) and row from the top (0 to 3): Unicode block U+2800.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
#: The fewest x units an axis spans.
SHORTEST_AXIS = 16.0


@dataclass(frozen=True)
class Curve:
    """A series and how it is drawn.

    ``role`` is its colour; ``points`` draws a mark per value instead of a line; ``label``, one character, stands at
    its newest value, so that curves can be told apart without colours.
    """

    series: Series
    role: str = "accent"
    points: bool = False
    label: str = ""


@dataclass(frozen=True)
class Scale:
    """The y axis: values from ``low`` to ``high``, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 at the bottom to 1 at the top."""
        if self.log:
            value, low, high = math.log10(max(value, self.low)), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0)


def scale_for(curves: Sequence[Curve], *, log: bool = False) -> Scale | None:
    """A y axis with round ends that holds all finite values, or None without any.

    A logarithmic axis is only possible when every value is above 0; else it is linear.
    """
    lows = [b.low for curve in curves for b in curve.series.buckets if b.count]
    highs = [b.high for curve in curves for b in curve.series.buckets if b.count]
    if not lows:
        return None
    low, high = min(lows), max(highs)
    if log and low > 0:
        step = 10 ** math.floor(math.log10(low))
        floor = math.floor(low / step * (1 + 1e-9)) * step
        top = 10 ** math.floor(math.log10(high))
        ceiling = math.ceil(high / top * (1 - 1e-9)) * top
        return Scale(floor, ceiling if ceiling > floor else floor * 2, log=True)
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-30):
        pad = abs(high) * 0.1 or 1.0
        return Scale(low - pad, high + pad)
    step = nice_step((high - low) / 8)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def axis_end(last: float, total: float, shortest: float = SHORTEST_AXIS) -> float:
    """The right end of the x axis for curves that reach ``last`` of a run of ``total``: total / 2**n, or more."""
    end = max(total, shortest)
    if total <= 0 or last > end:
        end = shortest
        while end < last:
            end *= 2
        return end
    while end / 2 >= max(last, shortest):
        end /= 2
    return end


def tick(value: float) -> str:
    """A short label of an axis."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ticks(scale: Scale, rows: int) -> dict[int, float]:
    """The rows, counted from the top, that get a label, with round values at least three rows apart."""
    if scale.log:
        decade = 10 ** math.floor(math.log10(scale.low))
        values = [decade * 10**power * factor for power in range(8) for factor in (1, 2, 5)]
    else:
        step = nice_step((scale.high - scale.low) / max(min(rows // 3, 5), 1))
        first = math.ceil(scale.low / step - 1e-9)
        values = [(first + n) * step for n in range(12)]
    named: dict[int, float] = {}
    for value in [scale.low, scale.high, *values]:
        row = round((1 - scale.place(value)) * (rows - 1))
        if scale.low * (1 - 1e-9) <= value <= scale.high * (1 + 1e-9) and all(abs(row - have) >= 3 for have in named):
            named[row] = value
    return named or {0: scale.high}


def plot(curves: Sequence[Curve], width: int, height: int, scale: Scale, end: float, start: float = 0.0) -> list[Line]:
    """The curves as ``height`` lines of ``width`` cells; of two in one cell, the later one is seen."""
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
                dot(x, rows - 1, curve, "bad")
            if not bucket.count:
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
    return [runs_of_one_style(cells[y], roles[y], labels[y]) for y in range(height)]


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
        self.log_scale = False

    def show(self, curves: Sequence[Curve], figures: Line, total: float) -> None:
        """Draw curves; ``figures`` follow the name in the title, ``total`` is the x at which the run will end."""
        self._curves, self._figures, self._total = curves, figures, total
        self.redraw()

    def title(self, width: int) -> Line:
        """The name and the latest figures, as many as fit."""
        line: Line = [(self.label, "bold")]
        room = width - len(self.label)
        for text, role in self._figures:
            if len(text) + 1 > room:
                break
            line.append((f" {text}", role))
            room -= len(text) + 1
        return line

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        scale = scale_for(self._curves, log=self.log_scale)
        if height < 1 or width < 4:
            return []
        if scale is None:
            return [[] for _ in range((height - 1) // 2)] + [[("no steps yet".center(width)[:width], "dim")]]
        end = axis_end(max(curve.series.last_x for curve in self._curves), self._total, self._shortest)
        labels = 7 if self._axis and width >= 30 and height >= 3 else 0
        axis = 1 if labels and height >= 6 else 0
        rows = plot(self._curves, width - labels, height - axis, scale, end)
        if not labels:
            return rows
        named = ticks(scale, len(rows))
        lines: list[Line] = []
        for y, row in enumerate(rows):
            label = tick(named[y])[:6].rjust(6) if y in named else " " * 6
            lines.append([(f"{label}{'┤' if y in named else '│'}", "dim"), *row])
        if axis:
            right = self.end_label(end) + (" (log)" if scale.log else "")
            lines.append([(" " * labels + "0".ljust(width - labels - len(right)) + right, "dim")])
        return lines
