"""Medians and their spread."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from finetui.engine.bench.clock import Time, stopwatch


def test_one_slow_call_moves_neither_median_nor_range() -> None:
    time = Time.of([1.0] * 9 + [100.0] + [1.1] * 10)
    assert (time.median, time.low, time.high, time.calls) == (1.1, 1.0, 1.1, 20)
    with pytest.raises(ValueError, match="nothing"):
        Time.of([])


def test_a_function_is_warmed_up_and_called_often_enough() -> None:
    calls = []
    time = stopwatch(lambda: calls.append(1), torch.device("cpu"), budget_s=0.0, least=7)
    assert time.calls == 7
    assert len(calls) == 9
