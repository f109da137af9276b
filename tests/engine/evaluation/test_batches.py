"""Batches of like length that shrink where memory runs out."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch

from finetui.engine.evaluation.batches import Batches
from finetui.planner.errors import HardwareError

CPU = torch.device("cpu")
LENGTHS = [3, 9, 1, 7, 5]


def test_longest_first_and_answers_in_the_order_of_the_rows() -> None:
    seen: list[list[int]] = []
    told: list[tuple[int, int]] = []

    def work(chosen: list[int]) -> list[int]:
        seen.append(chosen)
        return [LENGTHS[row] * 10 for row in chosen]

    batches = Batches(2, pytest.fail)
    made = batches.over(LENGTHS, work, "rows", lambda _, done, total: told.append((done, total)), CPU)
    assert made == [30, 90, 10, 70, 50]
    assert seen == [[1, 3], [4, 0], [2]]
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_half_as_many_where_memory_runs_out_and_that_is_said() -> None:
    warned: list[str] = []

    def work(chosen: list[int]) -> list[int]:
        if len(chosen) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [LENGTHS[row] for row in chosen]

    batches = Batches(4, warned.append)
    assert batches.over(LENGTHS, work, "loss", lambda *_: None, CPU) == LENGTHS
    assert batches.size == 1
    assert warned == [f"loss: out of memory with {n} rows at once; going on with {n // 2}" for n in (4, 2)]


def test_one_row_that_does_not_fit_is_an_error_and_so_is_anything_else() -> None:
    def full(chosen: list[int]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(chosen: list[int]) -> list[int]:
        raise KeyError("x")

    with pytest.raises(HardwareError, match="one row of 9 tokens"):
        Batches(2, lambda _: None).over(LENGTHS, full, "loss", lambda *_: None, CPU)
    with pytest.raises(KeyError):
        Batches(2, lambda _: None).over(LENGTHS, broken, "loss", lambda *_: None, CPU)
