"""Figures of steps that the device may still be working on, read when it is done: nobody waits for them.

A host that asks for the loss, the gradient's norm or a count at the end of each step waits until the device has run
dry, and then lets it wait in turn for the update and for the first launches of the next step. Here figures are copied
on the device's own time, and told while it works on the step after.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


class Moment:
    """A point in the work that was handed to a device; on the CPU, which works as it is told, the present."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        self._at = time.perf_counter()

    @property
    def passed(self) -> bool:
        """Whether the device has come so far."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Until the device has come so far."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Self) -> float:
        """Seconds between two moments that have passed."""
        if self._event is None or earlier._event is None:
            return self._at - earlier._at
        return earlier._event.elapsed_time(self._event) / 1e3


@dataclass(frozen=True)
class Told:
    """What one optimiser step came to.

    Args:
        figures: what was added, by name, as lists of numbers.
        seconds: since the step before, or since whatever lay between.
    """

    step: int
    learning_rate: float
    figures: dict[str, list[float]]
    seconds: float


@dataclass(frozen=True)
class _Step:
    step: int
    learning_rate: float
    sizes: dict[str, int]
    numbers: Tensor
    begun: Moment
    done: Moment


class Unread:
    """The steps of one trainer that nobody has been told of, in their order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[_Step] = []
        self._begun: Moment | None = None

    def begin(self) -> None:
        """The next step begins here, as after a checkpoint was written."""
        self._begun = Moment(self._device)

    def add(self, step: int, learning_rate: float, figures: Mapping[str, Tensor]) -> None:
        """All work of a step has been handed to the device.

        Args:
            figures: scalars and vectors, on the device; of whole numbers those below 2⁵³.
        """
        flat = [figure.detach().reshape(-1).double() for figure in figures.values()]
        numbers = torch.cat(flat)
        if numbers.is_cuda:
            numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
        sizes = {name: part.numel() for name, part in zip(figures, flat, strict=True)}
        done = Moment(self._device)
        self._steps.append(_Step(step, learning_rate, sizes, numbers, self._begun or done, done))
        self._begun = done

    def read(self, *, but: float) -> Iterator[Told]:
        """Steps that are done; all ``but`` the latest so many are waited for."""
        while self._steps and (len(self._steps) > but or self._steps[0].done.passed):
            first = self._steps.pop(0)
            first.done.wait()
            parts = first.numbers.split(list(first.sizes.values()))
            figures = {name: part.tolist() for name, part in zip(first.sizes, parts, strict=True)}
            yield Told(first.step, first.learning_rate, figures, first.done.since(first.begun))
