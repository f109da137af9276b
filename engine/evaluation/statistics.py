"""How sure a figure is: intervals over rows, and whether one model does better than another on the same rows.

Every figure is a ratio of two sums over rows (loss over tokens, hits over tokens, passes over answers), so that one
resampling serves all: the percentile bootstrap over whole rows (Efron 1979), whose tokens are anything but independent.
Two models are compared on the same resampled rows (paired), which takes the difficulty of rows out of the difference.
Figures that are 0 or 1 per row have Wilson's interval instead (Wilson 1927), which holds for few rows too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

#: Resamples of the bootstrap, and its seed: the same rows give the same interval.
RESAMPLES, _SEED = 2000, 1729
#: Both tails together are 5%; the quantile of the normal distribution that belongs to it.
_TAIL, _Z = 0.025, 1.959963984540054
#: Fewer rows say nothing: resamples of so few hardly differ.
FEWEST = 10
#: Numbers held at a time while resampling.
_HELD = 4_000_000

Verdict = Literal["better", "worse", "no difference", "too few rows"]


@dataclass(frozen=True)
class PerRow:
    """A figure row by row: its value is the sum of ``parts`` over the sum of ``weights``.

    Args:
        parts: of each row.
        weights: of each row, such as its tokens; 0 where the row has no such figure.
        lower_is_better: of the figure.
    """

    parts: tuple[float, ...]
    weights: tuple[float, ...]
    lower_is_better: bool = False

    @classmethod
    def of(cls, values: Sequence[float | None], *, lower_is_better: bool = False) -> PerRow:
        """A plain mean over rows; None is a row without a value."""
        parts = tuple(0.0 if value is None else float(value) for value in values)
        return cls(parts, tuple(0.0 if value is None else 1.0 for value in values), lower_is_better)

    @property
    def rows(self) -> int:
        """How many rows have the figure."""
        return sum(weight > 0 for weight in self.weights)

    @property
    def value(self) -> float:
        """The figure; NaN without rows."""
        total = math.fsum(self.weights)
        return math.fsum(self.parts) / total if total else math.nan

    @property
    def binary(self) -> bool:
        """Whether each row either passes or does not."""
        return all(w in (0.0, 1.0) for w in self.weights) and all(part in (0.0, 1.0) for part in self.parts)

    def interval(self) -> tuple[float, float]:
        """Where the figure lies with 95% confidence; NaN where there are no rows, or one that is no share."""
        if self.binary:
            return wilson(round(math.fsum(self.parts)), self.rows)
        kept = np.array(self.weights) > 0
        parts, weights = np.array(self.parts)[kept], np.array(self.weights)[kept]
        return _percentiles([parts], [weights])


@dataclass(frozen=True)
class Difference:
    """How far one model's figure is above another's on the same rows, with 95% confidence between ``low`` and ``high``.

    ``verdict`` is ``better`` or ``worse`` only where that interval leaves 0 out.
    """

    value: float
    low: float
    high: float
    rows: int
    verdict: Verdict


def difference(one: PerRow, other: PerRow) -> Difference:
    """``one`` held against ``other``, over the rows that have both.

    Raises:
        ValueError: they are not figures of the same rows.
    """
    if len(one.parts) != len(other.parts) or one.lower_is_better is not other.lower_is_better:
        raise ValueError(f"figures of {len(one.parts)} and of {len(other.parts)} rows can't be paired")
    kept = (np.array(one.weights) > 0) & (np.array(other.weights) > 0)
    rows = int(kept.sum())
    if not rows:
        return Difference(math.nan, math.nan, math.nan, 0, "too few rows")
    parts = [np.array(figure.parts)[kept] for figure in (one, other)]
    weights = [np.array(figure.weights)[kept] for figure in (one, other)]
    value = float(parts[0].sum() / weights[0].sum() - parts[1].sum() / weights[1].sum())
    low, high = _percentiles(parts, weights)
    verdict: Verdict = "no difference"
    if rows < FEWEST:
        verdict = "too few rows"
    elif low > 0 or high < 0:
        verdict = "better" if (high < 0) is one.lower_is_better else "worse"
    return Difference(value, low, high, rows, verdict)


def wilson(passed: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share: the shares p that differ from passed / total by at most 1.96 of their own
    standard deviations sqrt(p (1 - p) / total). NaN if ``total`` is 0."""
    if not total:
        return math.nan, math.nan
    share, square = passed / total, _Z * _Z / total
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _percentiles(parts: Sequence[Any], weights: Sequence[Any]) -> tuple[float, float]:
    """The middle 95% of a ratio of sums over resampled rows, or of the first such ratio less the second."""
    count = len(parts[0])
    if count < 2:
        return math.nan, math.nan
    draw = np.random.Generator(np.random.PCG64(_SEED))
    made = []
    for begin in range(0, RESAMPLES, at_once := max(_HELD // count, 1)):
        chosen = draw.integers(count, size=(min(at_once, RESAMPLES - begin), count))
        ratios = [part[chosen].sum(1) / weight[chosen].sum(1) for part, weight in zip(parts, weights, strict=True)]
        made.append(ratios[0] if len(ratios) == 1 else ratios[0] - ratios[1])
    low, high = np.quantile(np.concatenate(made), [_TAIL, 1 - _TAIL]).tolist()
    return float(low), float(high)
