"""The order in which rows are trained on: a function of the seed alone.

Rows are drawn without replacement, one permutation per pass over the data, the passes joined without a gap. Step
``k`` trains on the same rows however many ranks share the work and whether or not the run was interrupted before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Order:
    """Yields, for one rank, the row numbers of each micro-batch of ``steps`` optimiser steps.

    A step has ``accumulation`` micro-batches per rank; micro-batch ``m`` of rank ``r`` takes the rows at
    ``(m * world + r) * micro_batch`` of the step's ``accumulation * world * micro_batch`` rows.
    """

    rows: int
    steps: int
    micro_batch: int
    accumulation: int
    rank: int = 0
    world: int = 1
    seed: int = 0

    @property
    def batch_size(self) -> int:
        """Rows per optimiser step over all ranks."""
        return self.micro_batch * self.accumulation * self.world

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        position = 0
        for _ in range(self.steps):
            for micro in range(self.accumulation):
                start = position + (micro * self.world + self.rank) * self.micro_batch
                yield [self._row(start + offset) for offset in range(self.micro_batch)]
            position += self.batch_size

    def _row(self, position: int) -> int:
        return _permutation(self.rows, self.seed, position // self.rows)[position % self.rows]


_cached: dict[tuple[int, int, int], list[int]] = {}


def _permutation(rows: int, seed: int, number: int) -> list[int]:
    """The ``number``-th permutation; the latest few are kept, since a batch may straddle two passes."""
    key = (rows, seed, number)
    if key not in _cached:
        if len(_cached) > 8:
            _cached.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        _cached[key] = torch.randperm(rows, generator=generator).tolist()
    return _cached[key]
