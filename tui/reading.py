"""Reading curves: what they were at one x, and the next x to read."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from .series import Bucket, Series


def value_at(series: Series, x: float) -> Bucket | None:
    """The points at ``x``, or the last ones before it; None where the curve begins later."""
    before = bisect_right(series.buckets, x, key=lambda bucket: bucket.first)
    return series.buckets[before - 1] if before else None


def told(bucket: Bucket, shown: Callable[[float], str]) -> str:
    """A bucket's value, or the range that its values lie in."""
    if not bucket.count:
        return "not finite"
    low, high = shown(bucket.low), shown(bucket.high)
    return low if low == high else f"{low}–{high}"


def beside(many: Sequence[Series], at: float | None, distance: float) -> float | None:
    """The x to read next: about ``distance`` on from ``at`` (back, if it is negative), and at a point of the curves.

    Reading begins at the newest point, and ends where one goes on from there: both are None.
    """
    xs = sorted({bucket.last for series in many for bucket in series.buckets})
    if not xs or (at is None and distance > 0):
        return None
    if at is None:
        return xs[-1]
    here, there = bisect_left(xs, at), _nearest(xs, at + distance)
    if there == here and math.isclose(xs[here], at):  # points are further apart than that
        there += 1 if distance > 0 else -1
    if at >= xs[-1] and distance > 0:
        return None
    return xs[min(max(there, 0), len(xs) - 1)]


def nearest(many: Sequence[Series], x: float) -> float | None:
    """The x of the point of the curves that is nearest; None without one."""
    xs = sorted({bucket.last for series in many for bucket in series.buckets})
    return xs[_nearest(xs, x)] if xs else None


def _nearest(xs: Sequence[float], x: float) -> int:
    after = bisect_left(xs, x)
    if after in (0, len(xs)):
        return min(after, len(xs) - 1)
    return after if xs[after] - x <= x - xs[after - 1] else after - 1
