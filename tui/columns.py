"""Columns: which columns of a table fit into a width, and how wide each is. A whole column is given up before a figure
loses its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size


@dataclass(frozen=True)
class Column:
    """One column, by its heading.

    Args:
        right: whether it is right-aligned.
        rank: what is given up first where there is no room, the highest rank; 0 always stays.
        least: cells down to which its text may be cut, as names may; 0 for figures, which are never cut.
    """

    name: str
    right: bool = False
    rank: int = 0
    least: int = 0


def fitting(columns: Sequence[Column], rows: Sequence[Mapping[str, str]], room: int, gap: int = 1) -> dict[str, int]:
    """The columns that fit into ``room`` cells with ``gap`` cells between them, each with its width in cells.

    Names are cut before a column is given up, the last of them first.
    """
    kept = {
        column.name: max([cell_len(column.name), *(cell_len(row[column.name]) for row in rows)]) for column in columns
    }
    least = {column.name: column.least for column in columns if column.least}
    for column in sorted((column for column in columns if column.rank), key=lambda column: -column.rank):
        if sum(min(width, least.get(name, width)) + gap for name, width in kept.items()) - gap <= room:
            break
        del kept[column.name]
    for name in reversed([name for name in kept if name in least]):
        short = max(sum(width + gap for width in kept.values()) - gap - room, 0)
        kept[name] -= min(short, max(kept[name] - least[name], 0))
    return kept


def cut(text: str, width: int) -> str:
    """A text of at most ``width`` cells; one that is cut ends in an ellipsis."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(width - 1, 0)).rstrip()}…"


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, str]], room: int, gap: int = 2) -> list[str]:
    """A table as lines of plain text, the headings first."""
    widths = fitting(columns, rows, room, gap)

    def line(cells: Mapping[str, str]) -> str:
        parts = []
        for column in columns:
            if column.name in widths:
                text = cut(cells[column.name], widths[column.name])
                space = " " * (widths[column.name] - cell_len(text))
                parts.append(space + text if column.right else text + space)
        return (" " * gap).join(parts).rstrip()

    return [line({column.name: column.name for column in columns}), *(line(row) for row in rows)]
