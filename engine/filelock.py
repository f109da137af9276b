"""An exclusive lock on a file, on file systems without locks too.

A home on NFS may be mounted without a lock service, and some network and user-space file systems know no ``flock`` at
all. Whoever writes to a run does so on one machine, so a file of that machine can stand for the one that can't be
locked. The kernel releases either when its process ends, whatever ended it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path

from .folders import own_temporary

#: What file systems without locks answer.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class FileLock:
    """The right to write to one file.

    Args:
        fd: the open file; it stays the caller's.
        path: where it is, which is what its stand-in is found by.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path
        self._own: int | None = None

    @property
    def fd(self) -> int:
        """The descriptor that holds the lock: that of the file or of its stand-in."""
        return self._fd if self._own is None else self._own

    def acquire(self, *, wait: bool = True) -> None:
        """Take the lock.

        Raises:
            BlockingIOError: another process has it, and ``wait`` is false.
        """
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        if self._own is None:
            try:
                fcntl.flock(self._fd, how)
                return
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            self._own = os.open(_stand_in(self._path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self._own, how)

    def release(self) -> None:
        """Give it back."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the stand-in back, if there is one, and its lock with it."""
        if self._own is not None:
            os.close(self._own)
            self._own = None


def _stand_in(path: Path) -> Path:
    """A file of this machine and user for a file of any file system.

    Raises:
        OSError: the folder for them is not this user's own.
    """
    meant = os.path.realpath(path).encode(errors="surrogateescape")
    return own_temporary("finetui-locks") / hashlib.sha256(meant).hexdigest()[:32]
