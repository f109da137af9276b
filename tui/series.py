"""Series: a curve that may grow for days in a fixed amount of memory.

Points fall into buckets of equal length; when there are too many buckets, neighbours are merged and each bucket covers
twice as many points. A bucket keeps its minimum, maximum and last value, so that a spike stays visible however long
the run is, and it remembers that a value was not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Bucket:
    """Consecutive points: x from ``first`` to ``last``, y from ``low`` to ``high``, ``end`` the newest finite y.

    ``count`` finite points; ``broken`` if one was NaN or infinite.
    """

    first: float
    last: float
    low: float = math.inf
    high: float = -math.inf
    end: float = math.nan
    count: int = 0
    broken: bool = False

    def add(self, x: float, y: float) -> None:
        """One more point, right of the others."""
        self.last = x
        if -math.inf < y < math.inf:
            if y < self.low:
                self.low = y
            if y > self.high:
                self.high = y
            self.end = y
            self.count += 1
        else:
            self.broken = True

    def merge(self, later: Bucket) -> Bucket:
        """This bucket and the one right of it as one."""
        return Bucket(
            self.first,
            later.last,
            min(self.low, later.low),
            max(self.high, later.high),
            later.end if later.count else self.end,
            self.count + later.count,
            self.broken or later.broken,
        )


class Series:
    """A curve of at most ``capacity`` buckets, appended to from left to right."""

    def __init__(self, capacity: int = 2048) -> None:
        self.buckets: list[Bucket] = []
        self.latest = math.nan
        """The newest value, finite or not."""
        self._capacity = max(capacity, 2)
        self._points_per_bucket = 1
        self._points_in_last = 0

    def __bool__(self) -> bool:
        return bool(self.buckets)

    def append(self, x: float, y: float) -> None:
        """Add a point. One that is not right of the last point cuts off what is right of it first: a run that is
        resumed from a checkpoint goes over its last steps again."""
        if self.buckets and x <= self.buckets[-1].last:
            self.cut(x)
        self.latest = y
        if not self.buckets or self._points_in_last >= self._points_per_bucket:
            if len(self.buckets) >= self._capacity:
                self._halve()
            self.buckets.append(Bucket(x, x))
            self._points_in_last = 0
        self.buckets[-1].add(x, y)
        self._points_in_last += 1

    def cut(self, x: float) -> None:
        """Forget what is at ``x`` and right of it."""
        while self.buckets and self.buckets[-1].last >= x:
            self.buckets.pop()
        self._points_in_last = self._points_per_bucket
        self.latest = self.buckets[-1].end if self.buckets else math.nan

    def _halve(self) -> None:
        pairs = zip(self.buckets[::2], [*self.buckets[1::2], None], strict=False)
        self.buckets = [left.merge(right) if right else left for left, right in pairs]
        self._points_per_bucket *= 2

    @property
    def last_x(self) -> float:
        """The x of the newest point; 0 without one."""
        return self.buckets[-1].last if self.buckets else 0.0

    @property
    def lowest(self) -> float:
        """The smallest finite value; NaN without one."""
        return min((bucket.low for bucket in self.buckets if bucket.count), default=math.nan)

    @property
    def lowest_x(self) -> float:
        """Where the smallest finite value is, to within a bucket; NaN without one."""
        kept = [bucket for bucket in self.buckets if bucket.count]
        return min(kept, key=lambda bucket: bucket.low).last if kept else math.nan

    def since(self, x: float) -> Series:
        """What is at ``x`` and right of it, in the same buckets."""
        later = Series(self._capacity)
        later.buckets, later.latest = [bucket for bucket in self.buckets if bucket.last >= x], self.latest
        return later

    def columns(self, start: float, end: float, count: int) -> list[Bucket | None]:
        """The curve between two x as ``count`` columns; None where no point falls."""
        columns: list[Bucket | None] = [None] * count
        span = end - start
        if span <= 0 or count <= 0:
            return columns
        for bucket in self.buckets:
            place = (bucket.last - start) / span * (count - 1)
            if not 0 <= place < count:
                continue
            index = round(place)
            have = columns[index]
            columns[index] = have.merge(bucket) if have else bucket
        return columns
