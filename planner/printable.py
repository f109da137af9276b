"""Text from elsewhere, made safe to show: the one place that knows what a terminal would obey.

Model names, configs, datasets, logs, GPU names and exceptions may hold escape sequences, which recolour, retitle,
erase or answer for the user (https://invisible-island.net/xterm/ctlseqs/ctlseqs.html), and characters that make a line
read in another order than it is written (https://www.unicode.org/reports/tr36/, "Bidirectional Text Spoofing").
"""

from __future__ import annotations

import re

#: What a terminal obeys (C0 but tab and line feed, DEL, C1), what reorders or splits a line (bidirectional controls,
#: line and paragraph separators), what no encoding holds (halves of surrogate pairs), and invisible tag characters.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
#: Whole sequences: CSI, then the strings OSC DCS SOS PM APC up to their end, then two characters.
_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)


def is_printable(text: str) -> bool:
    """Whether text can be shown as it is."""
    return _OBEYED.search(text) is None


def printable(text: str) -> str:
    r"""Text with whatever a terminal would obey spelled out as ``\u001b``; tab and line feed stay.

    It is how JSON writes these characters inside a string, so that JSON text stays the same JSON.
    """
    return _OBEYED.sub(_spelled, text) if _OBEYED.search(text) else text


def unstyled(text: str) -> str:
    """Text without escape sequences, as of a log full of colours; what is left of them is spelled out."""
    return printable(_SEQUENCES.sub("", text))


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code > 0xFFFF:  # JSON knows such a character as two
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return f"\\u{code:04x}"
