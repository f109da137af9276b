"""Where finetui keeps what can be made again: in the user's cache, or among the temporary folders of the machine."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..planner.errors import UserError


def in_cache(present: Mapping[str, str], name: str) -> Path | None:
    """A folder of the user's cache, made if need be; None where it can't be.

    Args:
        present: the environment, which may say where caches are.
    """
    try:
        cache = Path(present.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetui" / name
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the second of a user without a home, as in a container
        return None  # a home that can't be written: all starts later, and works
    return cache


def cache_folder() -> Path:
    """Where made weights are kept: ``$XDG_CACHE_HOME/finetui``, or a temporary folder where that can't be written.

    Raises:
        UserError: the temporary folder is somebody else's, whose weights would be loaded.
    """
    folder = in_cache(os.environ, "")
    if folder is not None and os.access(folder, os.W_OK):
        return folder
    try:
        return own_temporary("finetui")
    except OSError as error:
        what, do = f"weights can't be made here ({error.strerror})", "Name another folder with XDG_CACHE_HOME=FOLDER."
        raise UserError(what, where=str(error.filename), do=do) from None


def own_temporary(name: str) -> Path:
    """A temporary folder of this machine and user, made if need be, in which nobody else can put anything.

    Raises:
        OSError: it can't be made, or is not this user's own.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    theirs = not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid()
    if theirs or found.st_mode & 0o022:
        what = "this folder belongs to somebody else" if theirs else "others can write to this folder"
        raise PermissionError(errno.EACCES, what, str(folder))
    return folder
