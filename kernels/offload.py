"""Tensors that wait for the backward pass in host memory, copied out and back beside the arithmetic.

A layer's forward takes longer than its few kept tensors need to cross a PCIe 4 or 5 bus, and its backward twice as
long, so on such machines the wait costs nothing. What is parked last is needed first: taking one tensor set back
starts the copy of the set parked before it.

The host runs ahead of the GPU, and memory that a copy still reads can't be given to anybody else. So parking waits
until the copy of the set before the last one is done; without that, everything would stay on the GPU until the host
caught its breath.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch


class Parked:
    """One set of tensors, from :func:`park` to :meth:`take`."""

    def __init__(self, lane: _Lane, tensors: Sequence[torch.Tensor]) -> None:
        self._lane = lane
        self._before = lane.latest
        here = torch.cuda.current_stream(lane.device)
        lane.stream.wait_stream(here)
        self._leaving: list[torch.Tensor] | None = list(tensors)
        self._device: list[torch.Tensor] | None = None
        self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        with torch.cuda.stream(lane.stream):
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._done = lane.stream.record_event()
        lane.latest = weakref.ref(self)

    def settle(self) -> None:
        """Wait for the copy out, and let the GPU's memory go."""
        if self._leaving is not None:
            self._done.synchronize()
            self._leaving = None

    def fetch(self) -> None:
        """Start the copy back, if nobody has."""
        if self._device is not None:
            return
        if self._leaving is not None:  # still here
            self._device, self._leaving = self._leaving, None
            return
        lane = self._lane
        self._device = [torch.empty(t.shape, dtype=t.dtype, device=lane.device) for t in self._host]
        # New memory may still be read by what was queued before.
        lane.stream.wait_stream(torch.cuda.current_stream(lane.device))
        with torch.cuda.stream(lane.stream):
            for tensor, host in zip(self._device, self._host, strict=True):
                tensor.copy_(host, non_blocking=True)
            self._done = lane.stream.record_event()

    def take(self) -> list[torch.Tensor]:
        """The tensors on the device again. Once."""
        self.fetch()
        torch.cuda.current_stream(self._lane.device).wait_event(self._done)
        before = self._before() if self._before is not None else None
        if before is not None:
            before.fetch()
        assert self._device is not None
        tensors, self._device = self._device, []
        self._lane.latest = self._before
        return tensors


class _Lane:
    """The copies of one device, in order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.latest: weakref.ref[Parked] | None = None


@functools.cache
def _lane(device: torch.device) -> _Lane:
    return _Lane(device)


def park(tensors: Sequence[torch.Tensor]) -> Parked:
    """Copy tensors of one CUDA device to the host. They must not be written to afterwards."""
    lane = _lane(tensors[0].device)
    last = lane.latest() if lane.latest is not None else None
    if last is not None and last._before is not None and (older := last._before()) is not None:
        older.settle()
    return Parked(lane, tensors)
