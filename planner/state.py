"""Where finetui keeps small files per user."""

from __future__ import annotations

import os
from pathlib import Path


def state_dir() -> Path:
    """Small files that finetui keeps per user: ``$XDG_STATE_HOME/finetui``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()) / "finetui"
