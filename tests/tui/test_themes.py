"""Every theme can be read: contrast of text and of what colours mean, and colours that stay apart for everyone."""

from __future__ import annotations

from itertools import combinations

import pytest
from textual.color import Color
from textual.theme import Theme

from finetui.planner.preferences import THEMES as SETTINGS
from finetui.tui.themes import COLOUR_BLIND, HIGH_CONTRAST, NAMES, THEMES

ROLES = ("foreground", "accent", "secondary", "success", "warning", "error")
#: Linear RGB as it is seen without red, green or blue cones (Machado, Oliveira and Fernandes 2009, severity 1).
BLIND = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(color: Color) -> list[float]:
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color.normalized]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of relative luminances."""
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (linear(Color.parse(c)) for c in (one, other))]
    return (max(light) + 0.05) / (min(light) + 0.05)


def seen(color: str, matrix: tuple[tuple[float, ...], ...]) -> list[float]:
    values = linear(Color.parse(color))
    return [sum(weight * value for weight, value in zip(row, values, strict=True)) for row in matrix]


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_everything_can_be_read(theme: Theme) -> None:
    least = 7.0 if theme is HIGH_CONTRAST else 4.5
    for role in ROLES:
        color, ground = getattr(theme, role), theme.background
        assert color is not None
        assert ground is not None
        assert contrast(color, ground) >= least, role


@pytest.mark.parametrize("kind", BLIND)
def test_verdicts_stay_apart(kind: str) -> None:
    roles = ("success", "warning", "error")
    for one, other in combinations(roles, 2):
        a, b = (seen(getattr(COLOUR_BLIND, role), BLIND[kind]) for role in (one, other))
        assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 0.2, (one, other)


def test_every_theme_of_the_settings_is_one() -> None:
    assert set(SETTINGS) == {"auto", *NAMES}
    assert {theme.name for theme in THEMES} <= set(NAMES.values())
