"""Tensors of a device on their way into ordinary host memory, at the speed of the bus.

A copy into memory that is not pinned goes through a buffer of the driver, by one thread, which also has to have each
page of new memory made: 1 to 3 GB/s. Pinned memory takes 50, but as much of it as a model has takes longer to pin than
to fill. So two small pinned pieces take turns: one is filled by the device while PyTorch's threads empty the other, all
of them touching new pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes of a piece: enough for the bus's full speed and for all threads.
PIECE = 64 * 2**20


@dataclass
class _Piece:
    memory: Tensor
    full: torch.cuda.Event
    target: Tensor | None = None

    def empty(self) -> None:
        if self.target is not None:
            self.full.synchronize()
            self.target.copy_(self.memory[: self.target.numel()])
            self.target = None


class Landing:
    """Copies into host memory; all of them are there when it is closed.

    Args:
        device: where tensors come from; of a CPU they are copied at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._pieces: list[_Piece] = []
        self._turn = 0
        if device.type == "cuda":
            self._pieces = [_Piece(_pinned(PIECE), torch.cuda.Event()) for _ in range(2)]

    def put(self, source: Tensor, target: Tensor) -> None:
        """Copy a contiguous tensor; what wrote it was launched on the current stream, and so is what may change it.

        Args:
            target: on the CPU, contiguous, with as many elements of the same dtype.
        """
        if not source.is_cuda:
            target.copy_(source.reshape(target.shape))
            return
        there, here = (t.detach().reshape(-1).view(torch.uint8) for t in (source, target))
        for start in range(0, here.numel(), PIECE):
            piece = self._pieces[self._turn]
            self._turn = 1 - self._turn
            piece.empty()
            part = here[start : start + PIECE]
            piece.memory[: part.numel()].copy_(there[start : start + PIECE], non_blocking=True)
            piece.full.record()
            piece.target = part

    def close(self) -> None:
        """Return when all is there."""
        for piece in self._pieces:
            piece.empty()


def _pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # the machine pins no more: copies are slower then
        return torch.empty(size, dtype=torch.uint8)
