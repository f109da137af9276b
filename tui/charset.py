"""Everything that is drawn, in ASCII, for terminals that have nothing else.

Widgets draw in Unicode. One filter at the very end turns each character into one of the same width, so that no widget
has to know and none can forget.
"""

from __future__ import annotations

import codecs
import sys
from io import TextIOWrapper

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

_TABLE: dict[str, str] = {
    **dict.fromkeys("─━═╌┄┈╴╶╼╾–—−▔", "-"),
    **dict.fromkeys("│┃║╎┆┊╵╷▏▕", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰╔╗╚╝╠╣╦╩╬┏┓┗┛┣┫┳┻╋", "+"),
    **dict.fromkeys("█▓▉▊▋▌▐■◼▇▆▅▄▀", "#"),
    **dict.fromkeys("▒▍▎▃▂", "="),
    **dict.fromkeys("░▁·•∙", "."),
    "✔": "+", "✘": "x", "●": "*", "◌": "~", "◐": "~", "◆": "o", "▸": ">", "▶": ">", "▾": "v", "▼": "v", "▲": "^",
    "‹": "<", "›": ">", "←": "<", "→": ">", "↑": "^", "↓": "v", "×": "x", "±": "~", "≈": "~", "…": "~", "°": " ",
    "≤": "<", "≥": ">", "“": '"', "”": '"', "‘": "'", "’": "'", "Δ": "d", "α": "a", "\u00a0": " ",
    "🔎": "/ ", "⏎": "$",
}  # fmt: skip


def to_ascii(text: str) -> str:
    """``text`` in ASCII, cell for cell: what has no likeness becomes ``?`` (``??`` for wide characters)."""
    return text if text.isascii() else "".join(_one(character) for character in text)


def _one(character: str) -> str:
    if character.isascii():
        return character
    if 0x2800 <= (code := ord(character)) <= 0x28FF:
        upper, lower = code & 0b00011011, code & 0b11100100
        return ":" if upper and lower else "'" if upper else "." if lower else " "
    return _TABLE.get(character) or "?" * cell_len(character)


def use_likenesses() -> None:
    """Make standard output and error write the likeness of what their encoding does not have, instead of failing."""
    codecs.register_error("likeness", _likeness)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="likeness")


def _likeness(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return to_ascii(error.object[error.start : error.end]), error.end


class AsciiFilter(LineFilter):
    """Turns every segment on its way to the terminal into ASCII."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """See :class:`textual.filter.LineFilter`."""
        return [
            segment if segment.text.isascii() else Segment(to_ascii(segment.text), segment.style, segment.control)
            for segment in segments
        ]
