"""Which process is meant by a number, for as long as the machine is up: numbers are given out again.

A start time in seconds since the epoch moves when the clock is set; ticks since boot don't.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """A process of this machine: its number, its start in ticks since boot, and which boot that was."""

    pid: int
    ticks: int
    boot: str

    @property
    def lives(self) -> bool:
        """Whether this very process is still there, and no zombie."""
        return self.boot == _boot() and _start(self.pid) == self.ticks


def this_process() -> Identity:
    """The process that asks."""
    pid = os.getpid()
    ticks = _start(pid)
    assert ticks is not None
    return Identity(pid, ticks, _boot())


def has_open(pid: int, path: Path) -> bool | None:
    """Whether a process has this very file open, wherever it has been moved to since.

    False where it has another file of that name open instead, as the process of a run has that is at work on what this
    is a copy of; None where it can't be told: it has neither, or is another user's.
    """
    seen = None
    try:
        mine = os.stat(path)
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.path.basename(os.readlink(entry.path)) == path.name:
                    if os.path.samestat(os.stat(entry.path), mine):
                        return True
                    seen = False
    except OSError:
        return None
    return seen


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _start(pid: int) -> int | None:
    """Field 22 of ``/proc/PID/stat`` (proc_pid_stat(5)); None without such a process, or for a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return None if state in "ZX" else int(rest[18])
