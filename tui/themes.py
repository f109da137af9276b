"""Themes: the colours of the app, each theme for eyes and terminals of its kind.

Colour never says anything alone: every verdict has a glyph and a word beside it, trained tokens are underlined, and
curves have names. So a theme changes comfort, not meaning.
"""

from __future__ import annotations

from textual.theme import Theme

#: Quiet colours: one accent, and green, amber and red for what they always mean.
DARK = Theme(
    name="finetui",
    primary="#7aa2c4",
    secondary="#b294bb",
    accent="#6fb3b8",
    success="#8fb573",
    warning="#d9a860",
    error="#d16d6d",
    foreground="#d3d7de",
    background="#14171c",
    surface="#14171c",
    panel="#1d2229",
    boost="#232932",
    dark=True,
    variables={"border-blurred": "#3c4653"},
)

LIGHT = Theme(
    name="finetui-light",
    primary="#2f5f8a",
    secondary="#7a4687",
    accent="#00656e",
    success="#3d6b1f",
    warning="#855300",
    error="#a62b2b",
    foreground="#23272e",
    background="#fbfbf9",
    surface="#fbfbf9",
    panel="#ececea",
    boost="#e0e2e2",
    dark=False,
    variables={"border-blurred": "#b6bcc4"},
)

#: Black and white, and colours at 7 : 1 or more against black (WCAG 2.2, 1.4.6).
HIGH_CONTRAST = Theme(
    name="finetui-high-contrast",
    primary="#8ec8ff",
    secondary="#ffa6ff",
    accent="#5ff0ff",
    success="#6cff6c",
    warning="#ffe14d",
    error="#ff9c9c",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#000000",
    boost="#333333",
    dark=True,
    variables={"border-blurred": "#9a9a9a"},
)

#: Blue, yellow and vermilion of Okabe and Ito's palette (Color Universal Design, 2008), which stay apart under
#: protanopia, deuteranopia and tritanopia; vermilion lightened until it can be read on black.
COLOUR_BLIND = Theme(
    name="finetui-colour-blind",
    primary="#56b4e9",
    secondary="#cc79a7",
    accent="#9ad0f0",
    success="#56b4e9",
    warning="#f0e442",
    error="#e8702a",
    foreground="#dfe2e6",
    background="#101215",
    surface="#101215",
    panel="#1b1f24",
    boost="#232932",
    dark=True,
    variables={"border-blurred": "#4b5560"},
)

THEMES = (DARK, LIGHT, HIGH_CONTRAST, COLOUR_BLIND)
#: What the settings call each theme, and what Textual does; the last two are the sixteen colours of the terminal's own.
NAMES = {
    "dark": DARK.name,
    "light": LIGHT.name,
    "high-contrast": HIGH_CONTRAST.name,
    "colour-blind": COLOUR_BLIND.name,
    "16-colours": "ansi-dark",
    "16-colours-light": "ansi-light",
}


def theme_named(setting: str, automatic: str) -> str:
    """Textual's name for a theme of the settings; ``automatic`` for ``auto``."""
    return NAMES.get(setting, automatic)
