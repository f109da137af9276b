"""What a system's writer makes of a job: the file, and what to type next."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ...planner.printable import printable
from ...planner.version import VERSION
from .clouds import System
from .job import Job

#: The module that carries a job out on its machine.
ATTEMPT = "finetui.engine.cluster.attempt"
#: What the name of a job file ends with.
SUFFIXES: dict[System, str] = {"skypilot": ".sky.yaml", "slurm": ".sbatch", "modal": ".modal.py"}


@dataclass(frozen=True)
class Written:
    """A job file.

    Args:
        text: its content.
        commands: what to type next, in order: why, and the words of the command.
        notes: what the user should know about this system beside the job's own notes.
    """

    text: str
    commands: list[tuple[str, list[str]]]
    notes: list[str] = field(default_factory=list)


def head(job: Job, base: Path) -> list[str]:
    """The lines that a job file begins with: what it does, what that was planned to take, and which files it needs."""
    lines = [f"{job.name}: written by finetui {VERSION}", *job.summary()]
    if job.mounts:
        lines.append("Files that come along:")
        lines += [f"  {near(mount.local, base)} ({_size(mount.bytes)})" for mount in job.mounts]
    return [printable(line) for line in lines]


def near(path: Path, base: Path) -> str:
    """A path of this machine as a job file has it: relative where it lies beside the file, so that both can move."""
    inside = path.is_relative_to(base) and path != base
    return f".{os.sep}{path.relative_to(base)}" if inside else str(path)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
