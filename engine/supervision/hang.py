"""Finds ranks that hang: in a collective that a peer never joins, in a read that never returns, stopped by a signal.

A rank gets on when it beats (:mod:`.heartbeat`) or when it reads or writes files: a checkpoint of 100 GB is written
without a forward pass. Computing is no sign of life once it trains, since a rank that waits in NCCL spins; before, it
is, since imports and tokenising beat rarely.

Time counts only while the supervisor itself was running: after a stop of the whole machine nobody hangs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from ...planner.recipe import Recipe
from .heartbeat import STACKS_SIGNAL, Beat

#: Files read and written between two looks that count as work: more than a line of a log.
_WORK_BYTES = 1 << 20
#: Share of the time that a rank which does not train yet must spend computing to count as at work.
_WORK_SHARE = 0.05
#: Longer between two looks than this, the supervisor was not running itself.
_AWAKE_S = 5.0
#: Seconds between two looks.
_EVERY_S = 1.0
#: Seconds that ranks get to write their stacks.
_STACKS_S = 3.0


@dataclass(frozen=True)
class Silent:
    """A rank without a sign of life.

    Args:
        seconds: since the last one.
        step: optimiser steps that it has done.
        training: it had begun to train.
        stopped: a signal (SIGSTOP) has stopped its process.
    """

    rank: int
    pid: int
    seconds: float
    step: int
    training: bool
    stopped: bool = False

    def __str__(self) -> str:
        place = f"after step {self.step}" if self.training else "before its first step"
        why = ", stopped by a signal (SIGSTOP)" if self.stopped else ""
        return f"rank {self.rank} has not moved for {self.seconds:.0f} s {place}{why}"


@dataclass
class _Last:
    """What a rank was last seen to have done, and for how long it has done nothing since."""

    beat: Beat
    silent_s: float = 0.0
    measured_at_s: float | None = None
    """``silent_s`` when what follows was measured."""
    bytes: int = 0
    computed_s: float = 0.0


class Watch:
    """Looks at the ranks of a run, again and again.

    Args:
        read: the latest beat of each rank.
        limit_s: seconds without a sign of life after which a rank hangs; None never.
        clock: seconds.
    """

    def __init__(
        self, read: Callable[[], list[Beat]], limit_s: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read, self._limit_s, self._clock = read, limit_s, clock
        self._last: dict[int, _Last] = {}
        self._looked = clock()

    def look(self) -> list[Silent]:
        """The ranks that hang, the one that was silent first at the front; cheap enough for every fraction of a second.

        A rank that has not introduced itself yet is not judged: nobody knows its process.
        """
        now = self._clock()
        if self._limit_s is None or now - self._looked < min(_EVERY_S, self._limit_s / 20):
            return []
        passed, self._looked = min(now - self._looked, _AWAKE_S), now
        hanging = []
        for rank, beat in enumerate(self._read()):
            if not beat.pid:
                self._last.pop(rank, None)
                continue
            last = self._last.get(rank)
            if last is None or (last.beat.pid, last.beat.count) != (beat.pid, beat.count):
                self._last[rank] = _Last(beat)
                continue
            last.silent_s += passed
            # Asking the system costs far more than a beat: only of ranks that begin to be suspect.
            if last.silent_s > self._limit_s / 4 and self._works(last):
                last.silent_s, last.measured_at_s = 0.0, None
            if last.silent_s >= self._limit_s:
                hanging.append(
                    Silent(rank, beat.pid, last.silent_s, beat.step, beat.training, stopped=is_stopped(beat.pid))
                )
        return sorted(hanging, key=lambda silent: -silent.seconds)

    def forgive(self) -> None:
        """Count the silence of every rank anew."""
        self._last.clear()

    def _works(self, last: _Last) -> bool:
        """Whether a rank, with what it has started, has read, written or, before training, computed meanwhile."""
        moved, computed = 0, 0.0
        with contextlib.suppress(psutil.Error):
            rank = psutil.Process(last.beat.pid)
            for process in [rank, *rank.children(recursive=True)]:
                with contextlib.suppress(psutil.Error, OSError):
                    moved += _file_bytes(process.pid)
                    if not last.beat.training:
                        times = process.cpu_times()
                        computed += times.user + times.system
        if last.measured_at_s is None:
            worked = False
        else:
            least_s = _WORK_SHARE * max(last.silent_s - last.measured_at_s, _EVERY_S)
            worked = moved - last.bytes >= _WORK_BYTES or computed - last.computed_s >= least_s
        if last.measured_at_s is None or worked:
            last.measured_at_s, last.bytes, last.computed_s = last.silent_s, moved, computed
        return worked


def hang_limit_s(recipe: Recipe) -> float | None:
    """Seconds after which a silent rank hangs: one that waits for rewards, which have limits of their own, does not."""
    limit_s = recipe.limits.hang_s
    return None if limit_s is None else limit_s + sum(reward.timeout_s for reward in recipe.rewards)


def _file_bytes(pid: int) -> int:
    """Bytes that a process has read and written so far, through the page cache or past it."""
    with open(f"/proc/{pid}/io", "rb") as file:
        figures = dict(line.split(b": ") for line in file.read().splitlines())
    return int(figures[b"rchar"]) + int(figures[b"wchar"]) + int(figures[b"read_bytes"])


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() in {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}
    return False


def take_stacks(pids: list[int], wait_s: float = _STACKS_S) -> None:
    """Have processes write the stacks of all their threads into their logs, and give them the time for it.

    A process that is stopped writes them when it is woken up, which this does not do.
    """
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)
    until = time.monotonic() + wait_s
    while any(_signal_waits(pid) for pid in pids if not is_stopped(pid)) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(min(0.2, wait_s))  # between taking the signal and having written the last line


def wake(pid: int) -> None:
    """Let a process go on that a signal has stopped."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _signal_waits(pid: int) -> bool:
    """Whether the request for stacks has not been delivered yet."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(("SigPnd:", "ShdPnd:")) and int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1:
                return True
    return False
