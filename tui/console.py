"""Console: Rich's, in which text from elsewhere can't command the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import console
from rich.segment import Segment

from ..planner.printable import is_printable, printable
from .outlet import GuardedStream


class Console(console.Console):
    """Text is spelled out before it is drawn, so that the sequences which Rich makes of styles are the only ones."""

    @property
    def file(self) -> Any:
        """The stream behind the guard, which would spell out the console's own colours."""
        stream: Any = super().file
        return stream.unguarded if isinstance(stream, GuardedStream) else stream

    @file.setter
    def file(self, stream: Any) -> None:
        self._file = stream

    def render(
        self, renderable: console.RenderableType, options: console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See :class:`rich.console.Console`."""
        for segment in super().render(renderable, options):
            if segment.control or is_printable(segment.text):
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)
