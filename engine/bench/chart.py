"""Bar charts as SVG: a title, groups of horizontal bars, and each bar's value in words. Readable on light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: Colours of series, told apart by those who see no red or green too (Okabe and Ito's palette).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_WIDTH, _LABEL, _VALUE, _BAR, _GAP = 860, 250, 150, 18, 14
_INK = "#808080"  # a grey that both a white and a black page leave readable


@dataclass(frozen=True)
class Bar:
    """One bar: whose it is, how long, and what is written at its end."""

    series: str
    value: float
    text: str = ""


@dataclass(frozen=True)
class Group:
    """Bars that are compared with each other; bars of one chart share a scale unless it is scaled by group."""

    label: str
    bars: Sequence[Bar]


def draw(title: str, note: str, groups: Sequence[Group], *, by_group: bool = False) -> str:
    """The chart as an SVG document.

    Args:
        note: what was measured, on what and when; stands below.
        by_group: the longest bar of each group fills the width, for groups whose values are far apart.

    Raises:
        ValueError: there is no bar.
    """
    series = list(dict.fromkeys(bar.series for group in groups for bar in group.bars))
    if not series:
        raise ValueError("a chart needs bars")
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)}
    longest = max(bar.value for group in groups for bar in group.bars)
    parts = [_text(16, 26, title, size=17, weight="bold")]
    x = 16.0
    for name in series:
        parts.append(f'<rect x="{x:.0f}" y="40" width="12" height="12" rx="2" fill="{colour[name]}"/>')
        parts.append(_text(x + 18, 51, name))
        x += 34 + 7.2 * len(name)
    y = 74.0
    for group in groups:
        scale = max((bar.value for bar in group.bars), default=1.0) if by_group else longest
        middle = y + _BAR * len(group.bars) / 2 + 4
        parts.append(_text(_LABEL - 10, middle, group.label, anchor="end"))
        for bar in group.bars:
            length = max(1.0, bar.value / scale * (_WIDTH - _LABEL - _VALUE)) if scale else 1.0
            parts.append(
                f'<rect x="{_LABEL}" y="{y + 2:.0f}" width="{length:.1f}" height="{_BAR - 4}" rx="2" '
                f'fill="{colour[bar.series]}"/>'
            )
            parts.append(_text(_LABEL + length + 6, y + _BAR - 5, bar.text or f"{bar.value:g}"))
            y += _BAR
        y += _GAP
    for line in note.splitlines():
        parts.append(_text(16, y + 12, line, size=11))
        y += 15
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 16:.0f}" width="{_WIDTH}" '
        f'font-family="ui-sans-serif, system-ui, sans-serif">\n<title>{escape(title)}</title>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, words: str, *, size: int = 12, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{_INK}">{escape(words)}</text>'
    )
