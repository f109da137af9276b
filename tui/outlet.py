"""Standard output and error, guarded: nothing that is printed can command the terminal.

Tables go through :class:`.console.Console` and the app through :class:`.printable_filter.PrintableFilter`, which let
their own colours and cursor movements past this guard and nobody else's.
"""

from __future__ import annotations

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


def guard_streams() -> None:
    """Guard standard output and error of this process, once."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, GuardedStream):
            setattr(sys, name, GuardedStream(stream))
