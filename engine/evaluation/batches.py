"""Rows in batches of like length, the longest first; where memory runs out, in batches of half as many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ...planner.errors import HardwareError
from ..supervision.failure import is_out_of_memory

T = TypeVar("T")
#: Receives what is being done, how much of it is done, and how much there is.
Told = Callable[[str, int, int], object]


class Batches:
    """How many rows go through a model at once: a number that only gets smaller.

    Args:
        size: rows to begin with.
        warn: receives a sentence when memory has run out.
    """

    def __init__(self, size: int, warn: Callable[[str], object]) -> None:
        self.size, self.warn = max(size, 1), warn

    def over(
        self, lengths: Sequence[int], work: Callable[[list[int]], Sequence[T]], what: str, told: Told, device: Any
    ) -> list[T]:
        """``work`` on all rows; what it gives for each, in the order of the rows.

        Args:
            lengths: of each row.
            work: takes the indices of one batch.
            what: for progress.

        Raises:
            HardwareError: memory runs out with a single row.
        """
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        made: dict[int, T] = {}
        told(what, 0, len(order))
        while len(made) < len(order):
            chosen = order[len(made) : len(made) + self.size]
            done = self._attempt(work, chosen)
            if done is None:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                if len(chosen) == 1:
                    do = "Use a GPU with more memory, or --device cpu."
                    raise HardwareError(f"out of memory over one row of {lengths[chosen[0]]} tokens", where=what, do=do)
                self.size = len(chosen) // 2
                self.warn(f"{what}: out of memory with {len(chosen)} rows at once; going on with {self.size}")
                continue
            made |= zip(chosen, done, strict=True)
            told(what, len(made), len(order))
        return [made[row] for row in range(len(order))]

    def _attempt(self, work: Callable[[list[int]], Sequence[T]], chosen: list[int]) -> Sequence[T] | None:
        """None where memory ran out; the error is gone then, and with it the tensors that its frames hold."""
        try:
            return work(chosen)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
