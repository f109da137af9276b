"""Alerts: what is worth calling somebody back for, each told once: the end of a run, divergence, a GPU that is gone.

A terminal that nobody looks at is told in three ways: its bell, a notification of the desktop (OSC 9, which iTerm2,
kitty, WezTerm, Windows Terminal and others show, through tmux and screen as well), and a command of the user's own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..engine.status import LIVE_STATES, Status
from ..planner.preferences import Preferences
from ..planner.printable import printable
from .history import History

Kind = Literal["finished", "stopped", "failed", "lost", "diverged", "gpu"]
#: Kinds that are bad news.
GRAVE: frozenset[str] = frozenset({"failed", "lost", "diverged", "gpu"})
#: Kinds that are states of the run.
STATES: frozenset[str] = frozenset({"finished", "stopped", "failed", "lost"})
#: A loss that has risen to this many times the least that its mean has been is said to diverge. Losses rise and fall
#: by tenths; twice is what a learning rate far too high does within a few steps.
_DIVERGED = 2.0
#: Steps before which a loss may do anything.
_SETTLED_STEPS = 50
#: Seconds that the user's command may take.
_COMMAND_S = 60.0


@dataclass(frozen=True)
class Alert:
    """Something to be told."""

    kind: Kind
    text: str


@dataclass
class Watchman:
    """Compares a run with what it was when last looked at. What is so at the first look is no news."""

    name: str
    _state: str | None = None
    _diverged: bool = False
    _gone: frozenset[int] = field(default_factory=frozenset)
    _attempt: int = 0

    def news(self, history: History, status: Status) -> list[Alert]:
        """What has happened since the last call."""
        first, before = self._state is None, self._state
        self._state = status.state
        told: list[Alert] = []
        if before in LIVE_STATES and status.state not in LIVE_STATES:
            why = f": {status.message}" if status.message else ""
            cause = f" ({status.cause})" if status.cause else ""
            told.append(Alert(status.state, f"{self.name} {status.state}{cause}{why}"))
        if history.attempt != self._attempt:
            self._attempt, self._diverged = history.attempt, False
        live = status.state in LIVE_STATES
        diverged = divergence(history)
        if diverged and not self._diverged and live and not first:
            told.append(Alert("diverged", f"{self.name}: {diverged}"))
        self._diverged = self._diverged or bool(diverged)
        gone = silent_gpus(history) if live else frozenset()
        if not first:
            told += [Alert("gpu", f"{self.name}: GPU {index} gives no reading") for index in sorted(gone - self._gone)]
        self._gone = gone
        return told


def divergence(history: History) -> str:
    """Why the loss is said to diverge, or nothing. A loss that may be 0 or below, as a reward's, is not judged."""
    if history.loss and not math.isfinite(history.loss.latest):
        return f"the loss is {history.loss.latest} at step {history.step}"
    mean, least = history.average.latest, history.average.lowest
    if history.step >= _SETTLED_STEPS and least > 0 and mean > _DIVERGED * least:
        return f"the loss has risen to {mean:.4f} at step {history.step}, from {least:.4f}"
    return ""


def silent_gpus(history: History) -> frozenset[int]:
    """GPUs whose last reading has no figure in it: the driver does not answer for them."""
    figures = ("memory_used_gib", "sm_percent", "power_w")
    return frozenset(index for index, gpu in history.gpus.items() if all(gpu.get(name) is None for name in figures))


def terminal_sequence(text: str, environment: Mapping[str, str]) -> str:
    """The bell, then the text as a notification of the desktop; nothing in the text is obeyed.

    tmux passes it on where ``allow-passthrough`` is on, screen always does; both ring the bell themselves.
    """
    words = printable(" ".join(text.split())).replace(";", ",")[:200]
    notice = f"\x1b]9;{words}\x07"
    if environment.get("TMUX"):
        notice = "\x1bPtmux;" + notice.replace("\x1b", "\x1b\x1b") + "\x1b\\"
    elif environment.get("TERM", "").startswith("screen") and environment.get("STY"):
        notice = f"\x1bP{notice}\x1b\\"
    return "\a" + notice


def run_command(command: str, alert: Alert, run: str) -> None:
    """Run the user's command for an alert, in a thread: ``$FINETUI_ALERT`` its kind, ``_TEXT``, ``_RUN``.

    Its output is dropped, because a full-screen app may own the terminal; one that fails says so on standard error.
    """
    words = {"FINETUI_ALERT": alert.kind, "FINETUI_TEXT": printable(alert.text), "FINETUI_RUN": run}
    silent = subprocess.DEVNULL

    def work() -> None:
        try:
            subprocess.run(
                command, shell=True, stdin=silent, stdout=silent, stderr=silent, env={**os.environ, **words},
                timeout=_COMMAND_S, check=True, start_new_session=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            print(f"finetui: the alert command failed ({error})", file=sys.stderr)

    threading.Thread(target=work, name="alert command", daemon=True).start()


def sound(alert: Alert, run: str, preferences: Preferences) -> str:
    """Run the user's command if there is one; returns what is to be written to the terminal, if the user wants it."""
    if preferences.alert_command:
        run_command(preferences.alert_command, alert, run)
    return terminal_sequence(alert.text, os.environ) if preferences.bell else ""
