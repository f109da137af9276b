"""Numbers as people read them. Every figure carries its unit."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
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

#: Glyph of what came of a check.
CHECK_GLYPHS = {"ok": "✔", "warn": "!", "fail": "✘"}


def count(value: float) -> str:
    """A count with at most three significant digits: ``8.03 B``, ``41.9 M``, ``512``."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:  # what is rounded up to it, too
            return f"{_three(value / limit)} {unit}"
    return f"{value:.0f}"


@dataclass(frozen=True)
class MemoryUnit:
    """What memory is shown in; figures come in GiB."""

    name: str
    smaller: str
    per_gib: float
    step: float


_UNITS = {"GiB": MemoryUnit("GiB", "MiB", 1.0, 1024.0), "GB": MemoryUnit("GB", "MB", 2**30 / 1e9, 1000.0)}
_unit = _UNITS["GiB"]


def use_memory_unit(name: str) -> None:
    """Show memory in ``GiB`` or ``GB`` from now on: the user's preference, set once where the program begins."""
    global _unit
    _unit = _UNITS[name]


def memory_unit() -> str:
    """The unit that memory is shown in."""
    return _unit.name


def gib(value: float) -> str:
    """Memory given in GiB: ``14.6 GiB``; below a tenth in MiB; or both in the user's unit."""
    shown = value * _unit.per_gib
    return f"{shown * _unit.step:.0f} {_unit.smaller}" if 0 <= shown < 0.1 else f"{shown:.1f} {_unit.name}"


def bare_gib(value: float, digits: int = 1) -> str:
    """Memory given in GiB as a bare number, for where the unit stands beside it."""
    return f"{value * _unit.per_gib:.{digits}f}"


def gib_of(used: float, total: float) -> str:
    """``14.6 of 23.6 GiB``."""
    return f"{bare_gib(used)} of {bare_gib(total)} {_unit.name}"


#: Memory in a sentence: ``14.6 GiB``, ``31.7 of 23.6 GiB``, and ``18.2 needed`` beside one of these.
_MEMORY = re.compile(r"(?P<number>\d[\d,]*(?:\.\d+)?)(?P<then> (?:of [\d,.]+ )?(?P<unit>[GM]iB)\b| needed\b)")


def sentence(text: str) -> str:
    """A sentence of the planner's or of a check, which say memory in GiB, in the user's unit."""
    if _unit.name == "GiB" or "iB" not in text:
        return text

    def shown(found: re.Match[str]) -> str:
        number, smaller = found["number"], found["unit"] == "MiB"
        factor = _unit.per_gib * (_unit.step / 1024 if smaller else 1.0)
        value = f"{float(number.replace(',', '')) * factor:{',' * (',' in number)}.{len(number.partition('.')[2])}f}"
        then = sentence(found["then"]) if " of " in found["then"] else found["then"]
        return value + then.replace("MiB", _unit.smaller).replace("GiB", _unit.name)

    return _MEMORY.sub(shown, text)


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


def off(ratio: float) -> str:
    """How far something is off what it was held against, from their ratio: ``+12%``, ``-3%``, ``±0%``."""
    text = f"{ratio - 1:+.0%}"
    return "±0%" if text[1:] == "0%" else text


def setting(value: object) -> str:
    """A setting's value as a recipe writes it: ``true``, ``0.0002``, ``none``."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


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


_NOISE = re.compile(r"\b(NVIDIA|GeForce|Tesla|Quadro|Graphics|Device|HBM\w*|PCIe)\b")


def short_name(name: str) -> str:
    """A GPU's name without what all of them have in common."""
    return re.sub(r"[ -]+", " ", _NOISE.sub("", name)).strip() or name


def path(value: Path) -> str:
    """A path with ``~`` for the home folder."""
    try:
        return f"~/{value.relative_to(Path.home())}"
    except (ValueError, RuntimeError):  # elsewhere, or there is no home folder
        return str(value)


def clock(when: float, now: float) -> str:
    """When something will be, by the clock here: ``17:40``, on another day ``Tue 17:40``, in a week ``3 Mar``."""
    if not math.isfinite(when):
        return "–"
    then, today = time.localtime(when), time.localtime(now)
    if when - now > 6 * 86400:
        return f"{then.tm_mday} {time.strftime('%b', then)}"
    return time.strftime("%H:%M" if then.tm_yday == today.tm_yday else "%a %H:%M", then)


def ago(when: float, now: float | None = None) -> str:
    """How long ago: ``now``, ``12 min ago``."""
    seconds = (time.time() if now is None else now) - when
    return "now" if seconds < 10 else f"{duration(seconds)} ago"


def _three(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
