"""Axes: round ends that hold all values, and where the labels stand. For charts of any kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .series import Bucket, Series

#: The fewest x units an axis spans.
SHORTEST_AXIS = 16.0


@dataclass(frozen=True)
class Scale:
    """The y axis: values from ``low`` to ``high``, linear or logarithmic.

    ``beyond`` is the largest value that is left out above ``high``, or NaN where none is.
    """

    low: float
    high: float
    log: bool = False
    beyond: float = math.nan

    def place(self, value: float) -> float:
        """Where a value lies, from 0 at the bottom to 1 at the top."""
        if self.log:
            value, low, high = math.log10(max(value, self.low)), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0)


#: Spikes are sought in curves of at least so many buckets, and are at most this share of them.
_LEAST_BUCKETS, _MOST_SPIKES = 40, 0.05
#: How many times the range that nine tenths of the values keep to a spike stands out above it.
_OUTSTANDING = 3.0


def scale_of(series: Iterable[Series], *, log: bool = False, spikes: bool = True) -> Scale | None:
    """A y axis with round ends that holds all finite values, or None without any.

    A logarithmic axis is only possible when every value is above 0; else it is linear.

    Args:
        spikes: whether a linear axis holds spikes too. Where it does not, they are left out above it: values far
            above the rest, between a curve's first descent and its end. A start from high up and a curve that ends
            high up (a divergence) are no spikes.
    """
    curves = [kept for one in series if (kept := [bucket for bucket in one.buckets if bucket.count])]
    buckets = [bucket for curve in curves for bucket in curve]
    if not buckets:
        return None
    low, high = min(bucket.low for bucket in buckets), max(bucket.high for bucket in buckets)
    beyond = math.nan
    if not spikes and not (log and low > 0) and (usual := _without_spikes(curves)) < high:
        beyond, high = high, usual
    if log and low > 0:
        step = 10 ** math.floor(math.log10(low))
        floor = math.floor(low / step * (1 + 1e-9)) * step
        top = 10 ** math.floor(math.log10(high))
        ceiling = math.ceil(high / top * (1 - 1e-9)) * top
        return Scale(floor, ceiling if ceiling > floor else floor * 2, log=True)
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-30):
        pad = abs(high) * 0.1 or 1.0
        return Scale(low - pad, high + pad, beyond=beyond)
    step = nice_step((high - low) / 8)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, beyond=beyond)


def _without_spikes(curves: Sequence[Sequence[Bucket]]) -> float:
    """The largest value of these curves that belongs to no spike."""
    highest = -math.inf
    for curve in curves:
        highs = sorted(bucket.high for bucket in curve)
        low, high = highs[len(highs) // 20], highs[len(highs) * 19 // 20]
        limit = high + _OUTSTANDING * max(high - low, abs(high) / 10)
        down = next((n for n, bucket in enumerate(curve) if bucket.high <= limit), len(curve))
        out = sum(bucket.high > limit for bucket in curve[down:])
        whole = len(curve) < _LEAST_BUCKETS or out > _MOST_SPIKES * len(curve) or curve[-1].high > limit
        kept = curve if whole else [*curve[:down], *(bucket for bucket in curve[down:] if bucket.high <= limit)]
        highest = max(highest, *(bucket.high for bucket in kept))
    return highest


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


def latest_part(last: float, end: float, parts: float) -> tuple[float, float]:
    """The stretch of an axis to ``end`` that shows what is newest, one part in ``parts`` of it long.

    It moves on by quarters of itself, so that it and the columns in it stand still while the curves grow into it.
    """
    quarter = end / parts / 4
    start = max(math.ceil(last / quarter) - 4, 0) * quarter
    return start, start + 4 * quarter


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
