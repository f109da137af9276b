"""What a process of a run prints goes to a log that is kept, shown and mailed: secrets are struck out on the way."""

from __future__ import annotations

import sys
from typing import Any

from ...planner.secrets import redact


class RedactedStream:
    """A text stream without the secrets of the environment; all else is the stream behind it.

    What native code writes to the descriptor itself does not pass here. Text is held until its line ends, since a
    traceback may be written in pieces; :meth:`flush` writes what there is.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._held = ""

    def write(self, text: str) -> int:
        """Write text; the length is that of what was asked for."""
        self._held += text
        whole, end, self._held = self._held.rpartition("\n")
        if end:
            self._stream.write(redact(whole) + end)
        return len(text)

    def flush(self) -> None:
        """Write what is held, and flush the stream behind."""
        if self._held:
            self._stream.write(redact(self._held))
            self._held = ""
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_streams() -> None:
    """Do so with standard output and error of this process, once."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactedStream):
            setattr(sys, name, RedactedStream(stream))
