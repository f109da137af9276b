"""What became of each key of another tool's file, as a table on stderr."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ..planner.importers import OUTCOMES, Fate, Imported
from .console import Console

_GLYPHS = {"carried": "✔", "default": "+", "not needed": "·", "not carried": "!", "unknown": "?"}
_STYLES = {"carried": "green", "default": "cyan", "not needed": "dim", "not carried": "yellow", "unknown": "red"}
_TITLES = {
    "carried": "carried over",
    "default": "not in the file, but what its tool does",
    "not needed": "not needed",
    "not carried": "not carried over",
    "unknown": "unknown",
}


def print_fates(found: Imported, console: Console | None = None) -> None:
    """Write the table; what needs a look comes last, where the eye is."""
    console = console or Console(stderr=True, highlight=False)
    for outcome in ("not needed", "carried", "default", "not carried", "unknown"):
        fates = [fate for fate in found.fates if fate.outcome == outcome]
        if not fates:
            continue
        console.print()
        console.print(Text(f"{_TITLES[outcome]} ({len(fates)})", style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(width=1)
        table.add_column(overflow="fold", max_width=38)
        table.add_column(overflow="fold")
        for left, right in _rows(fates):
            table.add_row(Text(_GLYPHS[outcome], style=_STYLES[outcome]), Text(left), Text(right))
        console.print(table)
    counts = ", ".join(f"{found.counts[name]} {name}" for name in OUTCOMES if name != "default")
    keys = sum(number for name, number in found.counts.items() if name != "default")
    console.print()
    console.print(f"{found.title}: {keys} keys: {counts}")


def _rows(fates: list[Fate]) -> list[tuple[str, str]]:
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
