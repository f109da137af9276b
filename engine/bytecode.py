"""Compiled modules for the processes of finetui, where the machine keeps none.

Images for containers often forbid Python to write compiled modules (PYTHONDONTWRITEBYTECODE) or hold the libraries
without them in a folder that can't be written. Each start then compiles some four thousand modules of torch,
transformers, peft and trl, which takes as long as all else that importing them takes. Here they get a folder of the
user's cache instead, so that only the first run on a machine pays for it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from .folders import in_cache

#: The largest libraries that every run imports. An image can hold one of them compiled and another not: what was
#: installed into it by pip is, what was copied into it is as it was.
_LIBRARIES = ("torch", "transformers")
_PACKAGE = (__package__ or "finetui").partition(".")[0]


def environment(present: Mapping[str, str]) -> dict[str, str]:
    """What a child process needs in its environment to keep compiled modules: nothing where they are kept already."""
    if present.get("PYTHONPYCACHEPREFIX"):
        return {}
    forbidden = bool(present.get("PYTHONDONTWRITEBYTECODE"))
    if not any(_is_compiled_each_time(library, forbidden=forbidden) for library in _LIBRARIES):
        return {}
    cache = in_cache(present, "modules")
    return {} if cache is None else {"PYTHONPYCACHEPREFIX": str(cache), "PYTHONDONTWRITEBYTECODE": ""}


def keep() -> None:
    """The same within this process, for what it imports from here on: a command has no parent that would say it."""
    if sys.pycache_prefix is None and _is_compiled_each_time(_PACKAGE, forbidden=sys.dont_write_bytecode):
        cache = in_cache(os.environ, "modules")
        if cache is not None:
            sys.pycache_prefix, sys.dont_write_bytecode = str(cache), False


def _is_compiled_each_time(package: str, *, forbidden: bool) -> bool:
    """Whether a package lies there without compiled modules, and importing it will not leave them there."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        return False
    source = Path(spec.origin)
    # Not importlib's cache_from_source: that looks below a prefix, once there is one, for what is kept beside it.
    compiled = source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
    return not compiled.exists() and (forbidden or not os.access(source.parent, os.W_OK))
