"""Curves as SVG: a picture that stands alone, readable on light and on dark, without fonts or scripts of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from ..planner.printable import printable
from .axes import scale_of, tick
from .history import Mark
from .series import Series

_WIDTH, _HEIGHT = 900, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 60, 50
#: Okabe and Ito's colours, which nobody confuses (https://jfly.uni-koeln.de/color/): each reads on white and on black.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "1 4")
_MARKS = {"checkpoint": "◆", "warning": "!", "fallback": "!", "nan": "×", "failure": "✘", "attempt": "▸"}
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.axis{stroke:#888;stroke-width:1}.grid{stroke:#8884;stroke-width:1}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.back{fill:#14171c}}"
)


@dataclass(frozen=True)
class Drawn:
    """A curve, its name, and whether it is drawn as single points or thin, below the others."""

    name: str
    series: Series
    points: bool = False
    thin: bool = False


def curves_svg(
    title: str,
    curves: Sequence[Drawn],
    *,
    across: str,
    end_label: Callable[[float], str] = tick,
    marks: Mapping[str, Sequence[Mark]] | None = None,
) -> str:
    """The curves as one SVG document.

    Args:
        title: the line above.
        curves: each has its colour and its dashes, so that they can be told apart without colour.
        across: what the x axis is.
        end_label: writes a value of the x axis.
        marks: what happened on the way, by kind and x.
    """
    scale = scale_of(curve.series for curve in curves)
    end = max((curve.series.last_x for curve in curves), default=0.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"'
        f' viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{_safe(title)}</title><style>{_STYLE}</style>',
        f'<rect class="back" width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="24" style="font-weight:600">{_safe(title)}</text>',
    ]
    if scale is None or end <= 0:
        return "".join([*parts, f'<text x="{_LEFT}" y="{_HEIGHT / 2}">no figures yet</text></svg>\n'])

    def at_x(value: float) -> float:
        return _LEFT + value / end * (_WIDTH - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        return _HEIGHT - _BOTTOM - scale.place(value) * (_HEIGHT - _TOP - _BOTTOM)

    bottom = _HEIGHT - _BOTTOM
    for share in range(5):
        value = scale.low + (scale.high - scale.low) * share / 4
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at_y(value):.1f}" y2="{at_y(value):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{at_y(value) + 4:.1f}" text-anchor="end">{tick(value)}</text>')
        x, anchor = at_x(end * share / 4), ("start", "middle", "middle", "middle", "end")[share]
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 34}" text-anchor="{anchor}">{_safe(end_label(end * share / 4))}</text>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="24" text-anchor="end">over {_safe(across)}</text>')
    legend = _LEFT
    for number, curve in enumerate(curves):
        color, dash = COLORS[number % len(COLORS)], _DASHES[number % len(_DASHES)]
        parts += _drawn(curve, color, dash, at_x, at_y)
        parts.append(f'<rect x="{legend}" y="36" width="12" height="4" fill="{color}"/>')
        parts.append(f'<text x="{legend + 17}" y="42">{_safe(curve.name)}</text>')
        legend += 35 + 8 * len(curve.name)
    for kind, glyph in _MARKS.items():
        for mark in (marks or {}).get(kind, ()):
            if 0 <= mark.step <= end:
                parts.append(
                    f'<text x="{at_x(mark.step):.1f}" y="{bottom + 16}" text-anchor="middle">{glyph}'
                    f"<title>{kind} at step {mark.step:,.0f}</title></text>"
                )
    return "".join([*parts, "</svg>\n"])


def _drawn(
    curve: Drawn, color: str, dash: str, at_x: Callable[[float], float], at_y: Callable[[float], float]
) -> list[str]:
    """One curve: circles, or lines that break where a value was not finite."""
    buckets = curve.series.buckets
    if curve.points:
        return [
            f'<circle cx="{at_x(one.last):.1f}" cy="{at_y(one.end):.1f}" r="4" fill="{color}"/>'
            for one in buckets
            if one.count
        ]
    pieces: list[list[str]] = [[]]
    for one in buckets:
        if one.count:
            for value in dict.fromkeys((one.low, one.high, one.end)):
                pieces[-1].append(f"{at_x(one.last):.1f},{at_y(value):.1f}")
        if one.broken or not one.count:
            pieces.append([])
    width, opacity = (1, 0.5) if curve.thin else (2, 1)
    return [
        f'<polyline fill="none" stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity}"'
        f' stroke-dasharray="{dash}" points="{" ".join(points)}"/>'
        for points in pieces
        if points
    ]


def _safe(text: str) -> str:
    return escape(printable(text))


def x_label(axis: str) -> Callable[[float], str]:
    """How a value of an axis of a comparison is written."""
    from . import format  # noqa: A004

    if axis == "time":
        return lambda value: format.duration(value) if value else "0"
    if axis == "$":
        return format.usd
    return lambda value: format.count(value) if math.isfinite(value) else "–"
