"""How long an operation takes on a device: medians with their spread, on a device that is warm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the median, and the range that the middle 80% lie in."""

    median: float
    low: float
    high: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Time:
        """Of several measurements.

        Raises:
            ValueError: there is none.
        """
        if not seconds:
            raise ValueError("nothing was measured")
        ordered = sorted(seconds)
        tenth = len(ordered) // 10
        return cls(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))


def stopwatch(function: Callable[[], object], device: torch.device, *, budget_s: float = 0.5, least: int = 5) -> Time:
    """Call a function again and again, for ``budget_s`` seconds and ``least`` times at least, after a warm-up.

    On a GPU each call is timed by events on its stream, which leaves out launches that run ahead; calls are queued in
    groups, since a wait after each would let the clocks fall.
    """
    for _ in range(2):
        function()
    if device.type != "cuda":
        return Time.of(_on_host(function, budget_s, least))
    seconds: list[float] = []
    torch.cuda.synchronize(device)
    ends = time.perf_counter() + budget_s
    while len(seconds) < least or time.perf_counter() < ends:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(10)]
        for begin, end in pairs:
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize(device)
        seconds += [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
    return Time.of(seconds)


def _on_host(function: Callable[[], object], budget_s: float, least: int) -> list[float]:
    seconds: list[float] = []
    ends = time.perf_counter() + budget_s
    while len(seconds) < least or time.perf_counter() < ends:
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return seconds
