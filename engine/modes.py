"""Who may read what finetui writes: a run's directory its user alone, a result that was exported whoever may usually.

A run holds pieces of the data it learns from, and what a model says about it; machines for training are often shared.
"""

from __future__ import annotations

import os
from pathlib import Path

#: Modes inside a run directory.
FOLDER, FILE = 0o700, 0o600


def keep_private() -> None:
    """From now on, whatever this process and its children make is for this user alone."""
    os.umask(0o777 & ~FOLDER)


def give_usual_modes(folder: Path) -> None:
    """Give a folder and all in it the modes that this process would make new ones with."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
