"""The last stop of what the app draws: no widget has to know what a terminal would obey, and none can forget."""

from __future__ import annotations

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from ..planner.printable import is_printable


class PrintableFilter(LineFilter):
    """Takes control characters out of every segment on its way to the terminal, cell for cell."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """See :class:`textual.filter.LineFilter`."""
        return [
            segment
            if segment.control or (segment.text.isascii() and segment.text.isprintable())
            else Segment(cell_for_cell(segment.text), segment.style)
            for segment in segments
        ]


def cell_for_cell(text: str) -> str:
    """Text of the same width in cells, with a replacement character where a control character would take room."""
    if is_printable(text) and "\n" not in text and "\t" not in text:
        return text
    return "".join(_shown(sign) for sign in text)


def _shown(sign: str) -> str:
    return sign if is_printable(sign) and sign not in "\n\t" else "\ufffd" * cell_len(sign)
