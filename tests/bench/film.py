"""A recorded session as one SVG that plays by itself, in any browser and in a README, without a script in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from finetui.tests.bench.screen import Cell, Screen, Style

#: Size of a cell and of the letters in it, in pixels.
CELL_W, CELL_H, FONT = 8.4, 19.0, 14.0
#: Space around the terminal, and the height of its title bar.
MARGIN, BAR = 12.0, 30.0
#: The terminal's own colours, and the sixteen of the palette.
BACK, FRONT = "#14171c", "#d3d7de"
PALETTE = (
    "#14171c", "#d16d6d", "#8fb573", "#d9a860", "#7aa2c4", "#b294bb", "#6fb3b8", "#d3d7de",
    "#3c4653", "#d16d6d", "#8fb573", "#d9a860", "#7aa2c4", "#b294bb", "#6fb3b8", "#ffffff",
)  # fmt: skip
#: The shortest time that a picture stands, in seconds: faster changes are one.
FRAME_S = 0.1

Row = tuple[Cell, ...]


@dataclass
class Film:
    """What each row of a terminal showed, and from when on."""

    width: int
    height: int
    rows: list[list[tuple[float, Row]]] = field(default_factory=list)
    length: float = 0.0


def from_the_first_picture(events: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The same events from when the first box was drawn on: what was written before is there at once."""
    start = next((when for when, text in events if "╭" in text), 0.0)
    return [(max(when - start, 0.0), text) for when, text in events]


def film(events: list[tuple[float, str]], size: tuple[int, int], *, rest_s: float = 2.0) -> Film:
    """Play what a program wrote, ``(seconds, text)`` each; the last picture stands for ``rest_s`` more."""
    screen = Screen(*size)
    shown: list[list[tuple[float, Row]]] = [[(0.0, tuple(row))] for row in screen.rows]
    for number, (when, text) in enumerate(events):
        screen.feed(text.encode())
        if number + 1 < len(events) and int(events[number + 1][0] / FRAME_S) == int(when / FRAME_S):
            continue
        for y, row in enumerate(screen.rows):
            if tuple(row) != shown[y][-1][1]:
                shown[y].append((when if when >= FRAME_S else 0.0, tuple(row)))
    return Film(*size, shown, (events[-1][0] if events else 0.0) + rest_s)


def as_svg(film: Film, title: str) -> str:
    """The film as SVG; it begins again when it has ended."""
    width, height = film.width * CELL_W + 2 * MARGIN, film.height * CELL_H + BAR + MARGIN
    drawn, moves = [], []
    for y, changes in enumerate(film.rows):
        for number, (begin, row) in enumerate(changes):
            end = changes[number + 1][0] if number + 1 < len(changes) else film.length
            if not (inside := "".join(_runs(row, y))):
                continue
            if begin == 0.0 and end == film.length:
                drawn.append(inside)
                continue
            moves.append(_shown_between(begin / film.length, end / film.length, f"k{len(moves)}", film.length))
            drawn.append(f'<g id="k{len(moves) - 1}" class="m">{inside}</g>')
    style = (
        f"text{{font:{FONT}px 'DejaVu Sans Mono','Menlo','Consolas',monospace;white-space:pre}}"
        ".m{visibility:hidden}.b{font-weight:bold}.i{font-style:italic}.u{text-decoration:underline}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">'
        f"<title>{escape(title)}</title><style>{style}{''.join(moves)}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="{BACK}"/>'
        f'<text x="{width / 2:.0f}" y="20" text-anchor="middle" fill="{FRONT}" fill-opacity=".6">{escape(title)}</text>'
        + f'<g fill="{FRONT}">{"".join(drawn)}</g></svg>\n'
    )


def _shown_between(begin: float, end: float, name: str, length: float) -> str:
    """CSS that shows an element between two shares of the film."""
    stops = [f"0%,{100 * begin:.3f}%{{visibility:hidden}}"] if begin > 0 else []
    stops.append(f"{100 * begin:.3f}%,{100 * end:.3f}%{{visibility:visible}}" if begin > 0 else
                 f"0%,{100 * end:.3f}%{{visibility:visible}}")  # fmt: skip
    stops += [f"{100 * end:.3f}%,to{{visibility:hidden}}"] if end < 1 else []
    return f"@keyframes {name}{{{''.join(stops)}}}#{name}{{animation:{name} {length:.1f}s steps(1) infinite}}"


def _runs(row: Row, y: int) -> list[str]:
    """A row as rectangles and texts, one of each per style."""
    found = []
    top = BAR + y * CELL_H
    x = 0
    for style, cells in groupby(row, key=lambda cell: cell.style):
        run = list(cells)
        text = "".join(cell.text for cell in run)
        left, wide = MARGIN + x * CELL_W, len(run) * CELL_W
        front, back = _colours(style)
        if back != BACK:
            found.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{CELL_H}" fill="{back}"/>')
        if text.strip():
            lead = len(text) - len(text.lstrip(" "))
            inner = text.strip(" ")
            mark = "".join(
                letter for letter, on in (("b", style.bold), ("i", style.italic), ("u", style.underline)) if on
            )
            classes = f' class="{" ".join(mark)}"' if mark else ""
            fill = f' fill="{front}"' if front != FRONT else ""
            fill += ' fill-opacity=".6"' if style.dim else ""
            found.append(
                f'<text x="{left + lead * CELL_W:.1f}" y="{top + CELL_H * 0.76:.1f}"'
                f' textLength="{sum(1 for _ in inner) * CELL_W:.1f}"{classes}{fill}>{escape(inner)}</text>'
            )
        x += len(run)
    return found


def _colours(style: Style) -> tuple[str, str]:
    """Letters and ground as ``#rrggbb``."""
    front, back = _colour(style.color) or FRONT, _colour(style.back) or BACK
    return (back, front) if style.reverse else (front, back)


def _colour(value: str) -> str:
    if not value or value.startswith("#"):
        return value
    number = int(value)
    if number < 16:
        return PALETTE[number]
    if number >= 232:
        return "#{0:02x}{0:02x}{0:02x}".format(8 + 10 * (number - 232))
    levels = (0, 95, 135, 175, 215, 255)
    number -= 16
    return f"#{levels[number // 36]:02x}{levels[number // 6 % 6]:02x}{levels[number % 6]:02x}"
