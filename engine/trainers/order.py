"""The order in which rows are trained on: a function of the seed alone.

Rows are drawn without replacement, one permutation per pass over the data, the passes joined without a gap. Step
``k`` trains on the same rows however many ranks share the work and whether or not the run was interrupted before it.
Where rows are padded, those of like length go into one micro-batch; which rows make a step stays as it is, and so does
its gradient, since losses are normalised over the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Order:
    """Yields, for one rank, the row numbers of each micro-batch of ``steps`` optimiser steps.

    A step has ``accumulation`` micro-batches per rank; micro-batch ``m`` of rank ``r`` takes the rows at
    ``(m * world + r) * micro_batch`` of the step's ``accumulation * world * micro_batch`` rows. With ``lengths``, the
    tokens of each row, these are sorted first, the longest at the front: if memory is short, that shows at once.
    """

    rows: int
    steps: int
    micro_batch: int
    accumulation: int
    rank: int = 0
    world: int = 1
    seed: int = 0
    lengths: Sequence[int] | None = None

    @property
    def batch_size(self) -> int:
        """Rows per optimiser step over all ranks."""
        return self.micro_batch * self.accumulation * self.world

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        position = 0
        for _ in range(self.steps):
            rows = [self._row(position + offset) for offset in range(self.batch_size)]
            if self.lengths is not None:
                rows.sort(key=self._longest_first)
            for micro in range(self.accumulation):
                start = (micro * self.world + self.rank) * self.micro_batch
                yield rows[start : start + self.micro_batch]
            position += self.batch_size

    def _longest_first(self, row: int) -> tuple[int, int]:
        assert self.lengths is not None
        return -self.lengths[row], row

    def passes(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return step * self.batch_size / self.rows

    def visited(self) -> list[int]:
        """The rows that any rank trains on, in ascending order."""
        return sorted({self._row(position) for position in range(min(self.steps * self.batch_size, 2 * self.rows))})

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


@dataclass(frozen=True)
class RolloutOrder(Order):
    """The order in which prompts are answered: ``batch_size`` completions per step, ``generations`` of each prompt.

    Completions of a prompt stand side by side, and the ranks take equal parts of the row, as TRL's trainers expect;
    each micro-batch is told the rank's whole part, which they cut up themselves. A batch of completions serves
    ``iterations`` steps.
    """

    generations: int = 1
    iterations: int = 1

    @property
    def prompts(self) -> int:
        """Prompts that are answered at a time."""
        return self.batch_size // self.generations

    def passes(self, step: int) -> float:
        """Passes over the prompts after so many steps."""
        return step / self.iterations * self.prompts / self.rows

    def __iter__(self) -> Iterator[list[int]]:
        share = self.micro_batch * self.accumulation
        for step in range(self.steps):
            first = step // self.iterations * self.prompts
            chosen = [
                self._row(first + position // self.generations)
                for position in range(self.rank * share, (self.rank + 1) * share)
            ]
            for _ in range(self.accumulation):
                yield chosen
