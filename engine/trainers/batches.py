"""How held-out rows are cut into batches, and figures that are means over such batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..evaluate import reduce_sum


def even_batches(rows: int, size: int, world: int, rank: int) -> Iterator[tuple[list[int], float]]:
    """This rank's batches of ``rows`` rows, and the share of all rows that each stands for.

    Trainers of TRL gather their figures in every batch: so the ranks have as many batches, and these as many rows.
    What is left over when all have had theirs is measured by every rank, for its share; none of its batches is a
    single row if that can be helped, since KTO needs another row's answer.
    """
    dealt = rows // (size * world) * world
    for number in range(rank, dealt, world):
        yield list(range(number * size, (number + 1) * size)), size / rows
    left = rows - dealt * size
    pieces = math.ceil(left / size)
    for number in range(pieces):
        begin, end = (dealt * size + part * left // pieces for part in (number, number + 1))
        yield list(range(begin, end)), (end - begin) / rows / world


class WeightedMeans:
    """Means of figures over batches of different weight."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, figures: dict[str, float], weight: float) -> None:
        """Take in the figures of one batch; one that is not there (no rejected answer in it) does not count."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def told(self, device: torch.device) -> dict[str, float]:
        """The means over all ranks; every rank must have seen the same names."""
        names = sorted(self.sums)
        pairs = torch.tensor([[self.sums[n], self.weights[n]] for n in names], dtype=torch.float64)
        pairs = reduce_sum(pairs, device)
        return {name: float(s / w) for name, (s, w) in zip(names, pairs.tolist(), strict=True) if w}
