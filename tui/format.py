"""Numbers as people read them. Every figure carries its unit."""

from __future__ import annotations

import math
import time
from pathlib import Path

#: Glyph and word of each run state: never colour alone, and each glyph exists in ASCII too (second item).
STATE_GLYPHS: dict[str, tuple[str, str]] = {
    "preparing": ("◌", "~"),
    "running": ("●", "*"),
    "stopping": ("◐", "~"),
    "finished": ("✔", "+"),
    "stopped": ("■", "#"),
    "failed": ("✘", "x"),
    "lost": ("?", "?"),
}


def count(value: float) -> str:
    """A count with at most three significant digits: ``8.03 B``, ``41.9 M``, ``512``."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{_three(value / limit)} {unit}"
    return f"{value:.0f}"


def gib(value: float) -> str:
    """Memory in GiB: ``14.6 GiB``; below a tenth in MiB."""
    return f"{value * 1024:.0f} MiB" if 0 <= value < 0.1 else f"{value:.1f} GiB"


def duration(seconds: float) -> str:
    """``38 s``, ``12 min``, ``3 h 07 min``, ``2 d 4 h``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def usd(value: float) -> str:
    """``$0.91``, ``$1,250``; nothing spent is ``$0``."""
    if value == 0:
        return "$0"
    return f"${value:,.2f}" if abs(value) < 1000 else f"${value:,.0f}"


def rate(value: float) -> str:
    """A rate without its unit: ``18,240``, ``7.4``."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def loss(value: float | None) -> str:
    """A loss with four decimals; ``nan`` stays visible."""
    if value is None:
        return "–"
    return f"{value:.4f}" if math.isfinite(value) else str(value)


def path(value: Path) -> str:
    """A path with ``~`` for the home folder."""
    try:
        return f"~/{value.relative_to(Path.home())}"
    except (ValueError, RuntimeError):  # elsewhere, or there is no home folder
        return str(value)


def ago(when: float, now: float | None = None) -> str:
    """How long ago: ``now``, ``12 min ago``."""
    seconds = (time.time() if now is None else now) - when
    return "now" if seconds < 10 else f"{duration(seconds)} ago"


def _three(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
