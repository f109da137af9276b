"""What an export made: where it lies, what was made sure of, what its user should know, and how to use it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...planner.errors import TrainingError
from ..run import Run

Tell = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Args:
        path: the folder.
        checked: what was made sure of, one sentence each.
        notes: where what loads it does otherwise than training did, and what was left out.
        use: command lines, or Python, that load it.
    """

    path: Path
    checked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    use: tuple[str, ...] = ()


def say_nothing(what: str, done: int, whole: int) -> None:
    """A :data:`Tell` for whoever does not want to know."""


def plain_name(run: Run) -> str:
    """A run's name as files, Modelfiles and commands can hold it: a folder may be called anything."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run.name).strip("-.")[:80] or "model"


def require_room(destination: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        destination: a folder that may not exist yet.
        needed: bytes.

    Raises:
        TrainingError: there is too little room (cause ``disk``).
    """
    place = next(path for path in (destination, *destination.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        what = f"the export takes {_size(needed)}, and {_size(free)} are free"
        raise TrainingError(what, cause="disk", where=str(place), do="Free some space, or choose another --out.")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
