"""Standard output and error, guarded: nothing that is printed can command the terminal.

Tables go through :class:`.console.Console` and the app through :class:`.printable_filter.PrintableFilter`, which let
their own colours and cursor movements past this guard and nobody else's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from ..planner.printable import printable


class GuardedStream:
    """A text stream that spells out control characters; all else is the stream behind it."""

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        """Write text; the length is that of what was asked for."""
        self.unguarded.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


def open_streams() -> None:
    """Put the null device in the place of standard streams that whoever started this process has closed.

    Else the next file that is opened would be theirs by its number, and get what libraries and children print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def give_up_output() -> None:
    """Let nothing more be written to standard output, which takes nothing any more: not even on the way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def guard_streams() -> None:
    """Guard standard output and error of this process, once."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, GuardedStream):
            setattr(sys, name, GuardedStream(stream))
