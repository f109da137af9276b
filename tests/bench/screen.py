"""Screen: what a terminal shows of the bytes that it was sent, cell by cell, with their styles.

It knows what Textual and rich write: moving the cursor, erasing, scrolling, SGR styles, private modes, titles. Anything
else is an error, so that no picture and no test can rest on bytes that were misread.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from dataclasses import dataclass, field, replace

from rich.cells import cell_len

#: Terminal modes that a program must leave as it found them.
CURSOR, ALTERNATE, WRAP, PASTE, FOCUS = "?25", "?1049", "?7", "?2004", "?1004"
MOUSE = ("?1000", "?1003", "?1015", "?1006", "?1016")

_TOKEN = re.compile(
    r"\x1b\[(?P<csi>[<>?=]?[0-9;:]*)(?P<between>[ $]*)(?P<final>[@-~])"
    r"|\x1b\](?P<osc>[^\x07\x1b]*)(?:\x07|\x1b\\)"
    r"|\x1b(?P<escape>[=>78M])"
    r"|(?P<control>[\x00-\x1a\x1c-\x1f\x7f])"
    r"|(?P<text>[^\x00-\x1f\x7f]+)"
)
_PARTIAL = re.compile(r"\x1b(?:\[[<>?=]?[0-9;:]*[ $]*|\][^\x07\x1b]*\x1b?)?\Z")


@dataclass(frozen=True)
class Style:
    """How a cell is drawn; colours are ``""`` (the terminal's own), ``"0"`` to ``"255"`` or ``"#rrggbb"``."""

    color: str = ""
    back: str = ""
    bold: bool = False
    dim: bool = False
    italic: bool = False
    underline: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell; the right half of a wide character holds no text."""

    text: str = " "
    style: Style = Style()


@dataclass
class Screen:
    """A terminal of ``width`` x ``height`` cells. Feed it bytes; read :attr:`rows`, :meth:`text` and :attr:`modes`."""

    width: int
    height: int
    rows: list[list[Cell]] = field(default_factory=list)
    modes: dict[str, bool] = field(default_factory=lambda: {CURSOR: True, WRAP: True})
    keyboard: int = 0
    """How many kitty keyboard modes were pushed and not popped."""
    title: str = ""
    bells: int = 0
    x: int = 0
    y: int = 0
    style: Style = Style()
    _rest: str = ""
    _main: tuple[list[list[Cell]], int, int] | None = None

    def __post_init__(self) -> None:
        self._decode = getincrementaldecoder("utf-8")(errors="replace").decode
        self.resize(self.width, self.height)

    def resize(self, width: int, height: int) -> None:
        """Cut or pad to another size; what was drawn stays where it was."""
        self.width, self.height = width, height
        self.rows = [self._padded(row) for row in self.rows[:height]]
        self.rows += [[Cell()] * width for _ in range(height - len(self.rows))]
        self.x, self.y = min(self.x, width - 1), min(self.y, height - 1)

    def _padded(self, row: list[Cell]) -> list[Cell]:
        return (row + [Cell()] * self.width)[: self.width]

    def feed(self, data: bytes) -> None:
        """Take in bytes, in pieces of any length.

        Raises:
            ValueError: a control sequence that this terminal does not know.
        """
        text = self._rest + self._decode(data)
        at = 0
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None:
                if _PARTIAL.match(text, at):
                    break
                raise ValueError(f"unknown control sequence: {text[at : at + 20]!r}")
            at = token.end()
            if token["text"]:
                self._print(token["text"])
            elif token["csi"] is not None:
                self._control(token["csi"], token["between"], token["final"])
            elif token["osc"] is not None:
                self.title = token["osc"].partition(";")[2] if token["osc"][:2] in ("0;", "2;") else self.title
            elif token["escape"]:
                self._escape(token["escape"])
            else:
                self._character(token["control"])
        self._rest = text[at:]

    def text(self) -> str:
        """What is shown, line by line, without trailing blanks."""
        return "\n".join("".join(cell.text for cell in row).rstrip() for row in self.rows)

    # --- the kinds of tokens

    def _print(self, text: str) -> None:
        for character in text:
            cells = cell_len(character)
            if cells == 0:
                continue
            if self.x + cells > self.width:
                if self.modes[WRAP]:
                    self.x = 0
                    self._line_feed()
                else:
                    self.x = max(self.width - cells, 0)
            row = self.rows[self.y]
            row[self.x] = Cell(character, self.style)
            if cells == 2 and self.x + 1 < self.width:
                row[self.x + 1] = Cell("", self.style)
            self.x += cells
        if not self.modes[WRAP]:
            self.x = min(self.x, self.width - 1)

    def _line_feed(self) -> None:
        if self.y < self.height - 1:
            self.y += 1
            return
        self.rows = [*self.rows[1:], [Cell()] * self.width]

    def _character(self, control: str) -> None:
        if control == "\n":
            self._line_feed()
        elif control == "\r":
            self.x = 0
        elif control == "\b":
            self.x = max(self.x - 1, 0)
        elif control == "\t":
            self.x = min((self.x // 8 + 1) * 8, self.width - 1)
        elif control == "\a":
            self.bells += 1

    def _escape(self, final: str) -> None:
        if final == "7":
            self._saved = (self.x, self.y)
        elif final == "8":
            self.x, self.y = getattr(self, "_saved", (0, 0))

    def _control(self, parameters: str, between: str, final: str) -> None:
        if final in "hl" and parameters.startswith("?"):
            for mode in parameters[1:].split(";"):
                self._set_mode(f"?{mode}", final == "h")
        elif final == "u" and parameters[:1] in "<>=":
            self.keyboard = max(self.keyboard + {"<": -1, ">": 1}.get(parameters[:1], 0), 0)
        elif between or parameters[:1] in ("?", ">", "<", "=") or final in "cnqt":
            return  # questions to the terminal, which this one leaves unanswered, and the shape of its cursor
        elif final == "m":
            self.style = styled(self.style, parameters)
        else:
            self._edit([int(number) if number else 0 for number in parameters.split(";")], final)

    def _edit(self, numbers: list[int], final: str) -> None:
        first = numbers[0]
        count = max(first, 1)
        if final in "Hf":
            second = numbers[1] if len(numbers) > 1 else 1
            self.y, self.x = min(count, self.height) - 1, min(max(second, 1), self.width) - 1
        elif final in "ABCDGd":
            self.y -= count if final == "A" else 0
            self.y += count if final == "B" else 0
            self.x += count if final == "C" else 0
            self.x -= count if final == "D" else 0
            self.x = count - 1 if final == "G" else self.x
            self.y = count - 1 if final == "d" else self.y
            self.x, self.y = min(max(self.x, 0), self.width - 1), min(max(self.y, 0), self.height - 1)
        elif final == "K":
            start, end = ((self.x, self.width), (0, self.x + 1), (0, self.width))[first]
            self.rows[self.y][start:end] = [Cell(style=Style(back=self.style.back))] * (end - start)
        elif final == "J":
            blank = Cell(style=Style(back=self.style.back))
            keep = {0: range(self.y), 1: range(self.y + 1, self.height)}.get(first, range(0))
            self.rows = [row if y in keep else [blank] * self.width for y, row in enumerate(self.rows)]
        else:
            raise ValueError(f"unknown control sequence: CSI {numbers} {final}")

    def _set_mode(self, mode: str, on: bool) -> None:
        if mode == ALTERNATE and on != self.modes.get(ALTERNATE, False):
            if on:
                self._main = (self.rows, self.x, self.y)
                self.rows = []
            elif self._main is not None:
                self.rows, self.x, self.y = self._main
            self.resize(self.width, self.height)
        self.modes[mode] = on


_FLAGS = {1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "reverse"}
_OFF = {22: ("bold", "dim"), 23: ("italic",), 24: ("underline",), 27: ("reverse",)}


def styled(style: Style, parameters: str) -> Style:
    """A style after one SGR sequence."""
    numbers = [int(number) if number else 0 for number in re.split("[;:]", parameters)]
    at = 0
    while at < len(numbers):
        number = numbers[at]
        at += 1
        if number == 0:
            style = Style()
        elif number in _FLAGS:
            style = replace(style, **{_FLAGS[number]: True})
        elif number in _OFF:
            style = replace(style, **dict.fromkeys(_OFF[number], False))
        elif number in (38, 48):
            if numbers[at] == 5:
                value, at = str(numbers[at + 1]), at + 2
            else:
                value, at = "#{:02x}{:02x}{:02x}".format(*numbers[at + 1 : at + 4]), at + 4
            style = replace(style, **{"color" if number == 38 else "back": value})
        elif number in (39, 49):
            style = replace(style, **{"color" if number == 39 else "back": ""})
        elif 30 <= number <= 37 or 90 <= number <= 97:
            style = replace(style, color=str(number - 30 if number < 90 else number - 82))
        elif 40 <= number <= 47 or 100 <= number <= 107:
            style = replace(style, back=str(number - 40 if number < 100 else number - 92))
    return style
