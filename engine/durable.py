"""Writes that outlast a crash, and the error of a disk that is full.

A small file is replaced whole or not at all; what must not get lost is flushed, and so is the folder that names it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..planner.errors import TrainingError

_NO_FLUSH = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
#: ``EFBIG`` is what a file-size limit answers with; for the user it is the same as a full disk.
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old content or the new, never a mixture.

    It is readable by its user alone. A link stays, and what it leads to is replaced; what is no file, as a device or a
    pipe is not, or is an open one of a process (``/dev/stdout``), is written to.
    """
    if _is_open_file(path) or (path.exists() and not path.is_file()):
        with open(os.open(path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as stream:
            stream.write(text)
        return
    path = Path(os.path.realpath(path))
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _is_open_file(path: Path) -> bool:
    """Whether a path leads through ``/proc/self/fd``, as ``/dev/stdout`` does, to a file that is open already."""
    for _ in range(40):  # as many links as Linux follows
        folder = Path(os.path.realpath(path.parent))
        if folder.is_relative_to("/proc"):
            return True
        if not path.is_symlink():
            return False
        path = folder / os.readlink(path)
    return False


def flush_all(folder: Path) -> None:
    """Wait until a folder is on the disk with all that is in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        flush(path)
    flush(folder)


def flush(path: Path, *, forget: bool = False) -> None:
    """Wait until a file, or a folder's list of names, is on the disk.

    Args:
        forget: let go of the copy in memory, so that who reads next reads the disk.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            os.fsync(fd)
        except OSError as error:  # some network file systems can't do that to a folder
            if not path.is_dir() or error.errno not in _NO_FLUSH:
                raise
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def is_disk_error(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that there is no room left on the disk.

    torch, safetensors and numpy wrap the operating system's error in exceptions of their own, without its number.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_ERRNOS:
            return True
        text = str(seen).lower()
        if any(words in text for words in ("no space left", "disk quota exceeded", "file too large", "os error 28")):
            return True
        if "pytorchstreamwriter failed" in text or "inline_container" in text:
            return True
        if isinstance(seen, OSError) and "requested and" in text and text.endswith("written"):  # numpy.ndarray.tofile
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextlib.contextmanager
def reported_as_disk_error(what: str, where: Path) -> Iterator[None]:
    """Turn a full disk inside the block into a :class:`TrainingError` of cause ``disk`` that says how full it is."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise disk_full(what, where) from error


def disk_full(what: str, where: Path) -> TrainingError:
    """The error for a disk without room."""
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(where).free / 2**30:.1f} GiB free)"
    return TrainingError(
        f"{what}: no space is left on the disk{free}",
        cause="disk",
        where=str(where),
        do="Free some space, or lower checkpoint.keep, then resume the run: older checkpoints are intact.",
    )
