"""What nothing that is read may do: take long, start a process, open a connection, or write outside of its folder."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

#: Seconds that one input may take: a template alone has 40 s before it is refused.
LONGEST_S = 90.0
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "shutil.rmtree"}  # fmt: skip
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "socket.bind",
          "pickle.find_class", "ctypes.dlopen"}  # fmt: skip


class Escaped(BaseException):
    """An input did one of these; no handler of the code under test may swallow it."""


_root: str | None = None


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    if _root is None:
        return
    if event in _NEVER:
        raise Escaped(f"{event} {arguments!r}"[:300])
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and isinstance(flags, int) and flags & _WRITES:
            _inside(event, path)
    elif event in _CHANGES:
        for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            if isinstance(path, str | bytes | os.PathLike):
                _inside(event, path)


def _inside(event: str, path: Any) -> None:
    real = os.path.realpath(os.fsdecode(path))
    allowed = [_root, os.path.realpath(tempfile.gettempdir()) + "/pymp-", os.devnull]
    if sys.pycache_prefix:  # where a verb that ran in this process keeps compiled modules
        allowed.append(os.path.realpath(sys.pycache_prefix))
    if "__pycache__" not in real and not real.startswith(tuple(str(place) for place in allowed)):
        raise Escaped(f"{event} {real}")


sys.addaudithook(_look)


@contextlib.contextmanager
def watched(root: Path) -> Iterator[None]:
    """Raise :class:`Escaped` at whatever the code inside must not do; it may write below ``root``."""
    global _root

    def over(number: int, frame: FrameType | None) -> None:
        raise Escaped(f"it took longer than {LONGEST_S:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    _root = os.path.realpath(root)
    try:
        yield
    finally:
        _root = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
