"""Charts are sound SVG, and their bars are as long as their values say."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from finetui.engine.bench.chart import Bar, Group, draw

GROUPS = [
    Group("none", [Bar("finetui", 200.0, "200 tok/s"), Bar("A & B", 100.0)]),
    Group("full", [Bar("finetui", 50.0)]),
]


def lengths(svg: str) -> list[float]:
    root = ET.fromstring(svg)
    rects = root.findall("{http://www.w3.org/2000/svg}rect")
    return [float(rect.get("width", "0")) for rect in rects if rect.get("x") == "250"]


def test_one_scale_for_all_bars() -> None:
    found = lengths(draw("Speed", "measured somewhere\nyesterday", GROUPS))
    assert [length / found[0] for length in found] == pytest.approx([1.0, 0.5, 0.25])


def test_a_scale_for_each_group() -> None:
    found = lengths(draw("Speed", "", GROUPS, by_group=True))
    assert found[2] == found[0]


def test_words_are_escaped_and_told() -> None:
    svg = draw("a < b", "note", GROUPS)
    words = [element.text for element in ET.fromstring(svg).iter() if element.text and element.text.strip()]
    assert {"a < b", "A & B", "200 tok/s", "100", "note", "none"} <= set(words)


def test_a_chart_needs_bars() -> None:
    with pytest.raises(ValueError, match="bars"):
        draw("Speed", "", [])
