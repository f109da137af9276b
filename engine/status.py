"""How a run stands: its state, why it ended, and the process at work on it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

RunState = Literal["preparing", "running", "stopping", "finished", "stopped", "failed", "lost"]
Cause = Literal["oom", "nan", "data", "crash", "disk", "preempted", "cost", "hang"]

#: States in which a process is (or should be) at work.
LIVE_STATES: frozenset[str] = frozenset({"preparing", "running", "stopping"})


@dataclass(frozen=True)
class Status:
    """The content of ``run.json``.

    ``pid`` and ``pid_started`` (seconds since the epoch) together name the supervisor's process: a pid alone may
    belong to somebody else after a reboot. ``spent_s`` is the time that earlier attempts were at work.
    """

    state: RunState = "preparing"
    cause: Cause | None = None
    message: str = ""
    do: str = ""
    attempt: int = 0
    pid: int = 0
    pid_started: float = 0.0
    host: str = ""
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    version: str = ""
    spent_s: float = 0.0

    def elapsed_s(self, now: float | None = None) -> float:
        """Seconds at work so far, over all attempts; ``now`` defaults to the clock."""
        if not self.started:
            return self.spent_s
        return self.spent_s + max(0.0, (self.ended or now or time.time()) - self.started)
