"""Signs of life: what each rank has last done, in memory that it shares with the supervisor.

A rank beats at every forward pass of its model, so at each micro-batch, each held-out batch and each token that is
generated, and whenever it enters a phase. A beat is one store into shared memory: no system call, no disk, nothing
that could itself hang. The memory is an anonymous file of the supervisor's, found under ``/proc``: it leaves nothing
behind, whoever is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import struct
from dataclasses import dataclass
from typing import Any

#: Where ranks find the memory: a path.
VARIABLE = "FINETUI_HEARTBEAT"
#: Makes a rank write the stack of each of its threads into its log, from C: a rank that hangs runs no Python.
STACKS_SIGNAL = signal.SIGUSR2

_LOG = 2
"""The descriptor that a rank's log is on."""
_SLOT = struct.Struct("=QQQQ")


@dataclass(frozen=True)
class Beat:
    """What a rank has told: its process, how often it has beaten, its step, and whether it has begun to train."""

    pid: int = 0
    count: int = 0
    step: int = 0
    training: bool = False


class Hearts:
    """The supervisor's side: one slot for each rank.

    Args:
        world: how many ranks there are.
    """

    def __init__(self, world: int) -> None:
        self._size = _SLOT.size * world
        self._fd = os.memfd_create("finetui-heartbeat")
        os.ftruncate(self._fd, self._size)
        self._memory = mmap.mmap(self._fd, self._size)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def read(self) -> list[Beat]:
        """The latest beat of each rank."""
        return [Beat(pid, count, step, bool(flag)) for pid, count, step, flag in _SLOT.iter_unpack(self._memory[:])]

    def clear(self) -> None:
        """Forget what ranks told that have ended."""
        self._memory[:] = bytes(self._size)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self._fd)

    def __enter__(self) -> Hearts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pulse:
    """A rank's side. Without a supervisor's memory its beats go nowhere, as for a worker that is started by hand."""

    def __init__(self, rank: int) -> None:
        self._memory: mmap.mmap | None = None
        self._at = rank * _SLOT.size
        self._count = self._step = 0
        self._training = False
        with contextlib.suppress(OSError, ValueError):  # the supervisor is gone, or watches fewer ranks
            if path := os.environ.get(VARIABLE):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    self._memory = mmap.mmap(fd, 0)
                finally:
                    os.close(fd)
                self.beat()

    def beat(self, step: int | None = None) -> None:
        """Say that this rank is getting on; ``step`` says that it trains, and how many optimiser steps are done."""
        self._count += 1
        if step is not None:
            self._step, self._training = step, True
        if self._memory is not None:
            _SLOT.pack_into(self._memory, self._at, os.getpid(), self._count, self._step, self._training)

    def rest(self) -> None:
        """Say that training is over: what follows is held to the rules of what came before it."""
        self._training = False
        self.beat()

    def feel(self, *modules: Any) -> None:
        """Beat whenever one of these PyTorch modules is called."""
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self.beat())


def leave_stacks() -> None:
    """From now on, a crash of the interpreter or :data:`STACKS_SIGNAL` leaves all stacks of this process in its log."""
    faulthandler.enable(file=_LOG, all_threads=True)
    faulthandler.register(STACKS_SIGNAL, file=_LOG, all_threads=True, chain=False)
