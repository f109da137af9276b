"""Scatter: offers by time and money, both on logarithmic axes, 2 x 4 dots per cell; the best choices stand out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .. import format  # noqa: A004
from ..offers import OfferRow
from .line_chart import DOTS, runs_of_one_style
from .lines import Line, Lines, Span

#: What can be had for nothing is drawn at this much, at the foot.
_LEAST_USD = 0.01


class Scatter(Lines):
    """Time to the right, money upwards: the best offers lie at the lower left."""

    TITLED = True

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._rows: Sequence[OfferRow] = ()
        self._at: OfferRow | None = None

    def show(self, rows: Sequence[OfferRow], at: OfferRow | None) -> None:
        """Draw the offers that fit; ``at`` is the one under the cursor."""
        self._rows, self._at = [row for row in rows if row.plan.fits], at
        self.redraw()

    def title(self, width: int) -> Line:
        """What the axes are."""
        if width < 15:
            return []
        return [("time →  money ↑", "bold"), *([("  ● ", "good"), ("best", "")] if width >= 26 else [])]

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if not self._rows:
            return [[], [("nothing fits".center(width)[:width], "dim")]]
        labels = 8 if width >= 28 else 0
        columns, lines = width - labels, height - 1
        if columns < 4 or lines < 1:
            return []
        times, prices = [row.plan.time_s for row in self._rows], [max(row.usd, _LEAST_USD) for row in self._rows]
        left, right, bottom, top = min(times), max(times), min(prices), max(prices)
        cells = [[0] * columns for _ in range(lines)]
        roles = [[""] * columns for _ in range(lines)]

        def place(row: OfferRow) -> tuple[int, int]:
            x = round(_share(row.plan.time_s, left, right) * (columns * 2 - 1))
            return x, round((1 - _share(max(row.usd, _LEAST_USD), bottom, top)) * (lines * 4 - 1))

        def dot(row: OfferRow, role: str) -> None:
            x, y = place(row)
            cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
            roles[y // 4][x // 2] = role

        for row in self._rows:
            dot(row, "trace")
        marks: list[dict[int, Span]] = [{} for _ in range(lines)]
        for row in self._rows:
            if row.best:
                x, y = place(row)
                marks[y // 4][x // 2] = ("●", "good")
        if self._at is not None and self._at.plan.fits:
            x, y = place(self._at)
            marks[y // 4][x // 2] = ("◆", "accent")
        drawn = [runs_of_one_style(cells[y], roles[y], marks[y]) for y in range(lines)]
        named = {0: format.usd(top), lines - 1: format.usd(bottom)} if labels else {}
        margin = [f"{named.get(y, '').rjust(labels - 1)}│" if labels else "" for y in range(lines)]
        foot, end = format.duration(left), format.duration(right)
        axis = " " * labels + foot + end.rjust(max(columns - len(foot), 0))
        return [*([(margin[y], "dim"), *drawn[y]] for y in range(lines)), [(axis, "dim")]]


def _share(value: float, low: float, high: float) -> float:
    """Where a value lies between two others on a logarithmic axis, from 0 to 1."""
    if high <= low:
        return 0.5
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
