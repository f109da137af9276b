"""The processes of a run by name, for whoever is about to end them."""

from __future__ import annotations

import contextlib
import socket

import psutil

from ..engine.run import Run
from ..planner.errors import RunError


def family(run: Run) -> list[str]:
    """The supervisor and everything below it, each as pid and what it is; empty where they can't be seen.

    Those of a run on another machine can't be, nor those of a supervisor that is gone.
    """
    try:
        status = run.recorded
    except RunError:
        return []
    if not status.pid or status.host != socket.gethostname():
        return []
    found: list[str] = []
    with contextlib.suppress(psutil.Error):
        supervisor = psutil.Process(status.pid)
        for process in [supervisor, *supervisor.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                found.append(f"{process.pid} {_title(process)}")
    return found


def _title(process: psutil.Process) -> str:
    """What a process is in a few words: the module or script that Python runs, else its name."""
    words = process.cmdline()
    if module := _module(words[1:]):
        return module.rpartition(".")[2] if module.startswith(("finetui.", "torch.")) else module
    script = next((word.rpartition("/")[2] for word in words[1:] if word.endswith(".py")), "")
    return f"{process.name()} {script}".strip()


def _module(words: list[str]) -> str:
    """What Python's own ``-m`` names; one that comes after a script is the script's."""
    place = 0
    while place < len(words) - 1 and words[place].startswith("-"):
        if words[place] == "-m":
            return words[place + 1]
        place += 2 if words[place] in ("-X", "-W") else 1
    return ""
