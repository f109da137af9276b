"""From a run to files that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from ...planner.errors import RunError
from ..run import Run

Target = Literal["adapter", "merged"]


def export_run(run: Run, to: Target, destination: str | Path) -> Path:
    """Write what a run made to ``destination``, whole or not at all.

    Args:
        to: ``adapter`` (PEFT format; the base is needed beside it) or ``merged`` (a model that stands alone).
        destination: a folder that does not exist yet, or is empty.

    Returns:
        The folder.

    Raises:
        RunError: the run has no model yet, can't be exported this way, or the folder is not empty.
        TrainingError: the disk is full (cause ``disk``).
    """
    destination = Path(destination).expanduser().resolve()
    if to not in get_args(Target):
        raise RunError(f"{to!r} is not a form of export", where="--to", do=f"Use {' or '.join(get_args(Target))}.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise RunError("the destination is not empty", where=str(destination), do="Choose a new folder.")
    if to == "adapter":
        from .adapter import export_adapter

        return export_adapter(run, destination)
    from .merged import export_merged

    return export_merged(run, destination)
