"""SampleView: one example as the model will see it, every token marked as trained or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len

from .lines import Line, Lines

if TYPE_CHECKING:
    from ...engine.data.preview import Sample

#: What a token may do to the terminal or the layout; line ends are drawn, and break the line.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_LINE_END = "⏎"


#: What stands between tokens, and around those that are trained, for eyes and terminals that need more than colour.
Marks = Literal["", "trained", "tokens"]
MARKS: tuple[Marks, ...] = ("", "trained", "tokens")


def _marked(sample: Sample, marks: Marks) -> Iterator[tuple[str, str]]:
    """Each token's text and role, with the marks before and after it."""
    inside = False
    for number, piece in enumerate(sample.pieces):
        if marks == "trained" and piece.trained != inside:
            yield ("[[" if piece.trained else "]]"), "key"
            inside = piece.trained
        if marks == "tokens" and number:
            yield "|", "key"
        yield _CONTROL.sub("·", piece.text), "trained" if piece.trained else "dim"
    if inside:
        yield "]]", "key"


def pieces_in_lines(sample: Sample, width: int, marks: Marks = "") -> list[Line]:
    """The tokens as lines of at most ``width`` cells; trained ones have the role ``trained``, others ``dim``."""
    lines: list[Line] = [[]]
    room = width
    for text, role in _marked(sample, marks):
        for character in text:
            shown = _LINE_END if character == "\n" else character
            cells = cell_len(shown)
            if cells > room:
                lines.append([])
                room = width
            line = lines[-1]
            if line and line[-1][1] == role:
                line[-1] = (line[-1][0] + shown, role)
            else:
                line.append((shown, role))
            room -= cells
            if character == "\n":
                lines.append([])
                room = width
    return lines if lines[-1] else lines[:-1]


class SampleView(Lines):
    """As high as it has to be: put it into something that scrolls."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._sample: Sample | None = None
        self._words = ""
        self._marks: Marks = ""

    def show(self, sample: Sample | None, words: str = "", marks: Marks = "") -> None:
        """Draw an example; without one, ``words`` say why."""
        self._sample, self._words, self._marks = sample, words, marks
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        if self._sample is None:
            return [[(self._words, "dim")]]
        return pieces_in_lines(self._sample, max(width, 2), self._marks)
