"""Compiled modules for the processes of a run, where the machine keeps none.

Images for containers often forbid Python to write compiled modules (PYTHONDONTWRITEBYTECODE) or hold the libraries
without them in a folder that can't be written. Each start then compiles some four thousand modules of torch,
transformers, peft and trl, which takes three to four times as long as importing them. Here they get a folder of the
user's cache instead, so that only the first run on a machine pays for it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

#: The largest library that every run imports.
_LIBRARY = "transformers"


def environment(present: Mapping[str, str]) -> dict[str, str]:
    """What a child process needs in its environment to keep compiled modules: nothing where they are kept already."""
    if present.get("PYTHONPYCACHEPREFIX"):
        return {}
    spec = importlib.util.find_spec(_LIBRARY)
    if spec is None or not spec.origin:
        return {}
    compiled = Path(importlib.util.cache_from_source(spec.origin))
    forbidden = bool(present.get("PYTHONDONTWRITEBYTECODE"))
    if compiled.exists() or not (forbidden or not os.access(Path(spec.origin).parent, os.W_OK)):
        return {}
    cache = Path(present.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetui" / "modules"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}  # a home that can't be written: the run starts later, and works
    return {"PYTHONPYCACHEPREFIX": str(cache), "PYTHONDONTWRITEBYTECODE": ""}
