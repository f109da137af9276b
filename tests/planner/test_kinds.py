"""What was read back is held against what is declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from finetui.planner.kinds import strange_field


@dataclass
class Told:
    """Every kind of field that is declared anywhere."""

    count: int = 0
    figure: float = 0.0
    maybe: float | None = None
    word: Literal["a", "b"] = "a"
    names: list[str] | None = None
    figures: dict[str, float] | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("name", "sound", "strange"),
    [
        ("count", [0, -3, 2.0], [True, "1", None, [], 2**64, float("nan")]),
        ("figure", [0, 1.5, float("inf"), "nan", "-inf"], ["1", None, {}, [1.0], 10**40, True]),
        ("maybe", [None, 1.0, "nan"], ["x", []]),
        ("word", ["a", "b"], ["c", ["a"], None]),
        ("names", [None, [], ["x"]], ["x", [1], [["x"]]]),
        ("figures", [{}, {"a": 1.0}, {"a": "nan"}], [[], {"a": "b"}, {"a": []}]),
        ("anything", [None, [], {}], []),
        ("of a later release", [[]], []),
    ],
)
def test_kinds(name: str, sound: list[Any], strange: list[Any]) -> None:
    assert [strange_field(Told, {name: value}) for value in sound] == [None] * len(sound)
    assert [strange_field(Told, {name: value}) for value in strange] == [name] * len(strange)
