"""What became of each key of another tool's file: in rows, and as a table on stderr."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..planner.importers import OUTCOMES, Fate, Imported, Outcome
from .console import Console

GLYPHS: dict[Outcome, str] = {"carried": "✔", "default": "+", "not needed": "·", "not carried": "!", "unknown": "?"}
_STYLES = {"carried": "green", "default": "cyan", "not needed": "dim", "not carried": "yellow", "unknown": "red"}
TITLES: dict[Outcome, str] = {
    "carried": "carried over",
    "default": "not in the file, but what its tool does",
    "not needed": "not needed",
    "not carried": "not carried over",
    "unknown": "unknown",
}


def print_fates(found: Imported, console: Console | None = None) -> None:
    """Write the table; what needs a look comes last, where the eye is."""
    console = console or Console(stderr=True, highlight=False)
    order: tuple[Outcome, ...] = ("not needed", "carried", "default", "not carried", "unknown")
    for outcome in order:
        fates = [fate for fate in found.fates if fate.outcome == outcome]
        if not fates:
            continue
        console.print()
        console.print(Text(f"{TITLES[outcome]} ({len(fates)})", style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(width=1)
        table.add_column(overflow="fold", max_width=38)
        table.add_column(overflow="fold")
        for left, right in rows_of(fates):
            table.add_row(Text(GLYPHS[outcome], style=_STYLES[outcome]), Text(left), Text(right))
        console.print(table)
    console.print()
    console.print(summary(found))


def summary(found: Imported) -> str:
    """Whose file it was, and how many of its keys came to what."""
    counts = ", ".join(f"{found.counts[name]} {name}" for name in OUTCOMES if name != "default")
    keys = sum(number for name, number in found.counts.items() if name != "default")
    return f"{found.title}: {keys} keys: {counts}"


def rows_of(fates: Sequence[Fate]) -> list[tuple[str, str]]:
    """Left and right of each row; keys that say nothing share one."""
    silent = {why: [fate.key for fate in fates if fate.why == why] for why in ("it is empty", "it is off")}
    rows = [(_left(fate), _right(fate)) for fate in fates if fate.why not in silent]
    return rows + [(", ".join(keys), why) for why, keys in silent.items() if keys]


def _left(fate: Fate) -> str:
    return f"{fate.key}: {fate.value}" if fate.key else f"{fate.to}: {fate.value}"


def _right(fate: Fate) -> str:
    """What a row says beside the key: where it went, and why."""
    if not fate.key:
        return fate.why
    target = f"→ {fate.to}" if fate.to else ""
    told = " ".join(part for part in (f"{fate.why}." if fate.do and fate.why else fate.why, fate.do) if part)
    return f"{target}  ({told})" if target and told else target or told
