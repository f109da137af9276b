"""How a recipe differs from the one that it came from."""

from __future__ import annotations

from finetui.tui.recipe_changes import changes

OLD = {"model": "a/b", "tuning": {"type": "lora", "rank": 8}, "epochs": 2}


def test_without_an_old_one_nothing_is_marked() -> None:
    assert {mark for mark, _ in changes(OLD, None)} == {" "}


def test_what_changed_came_and_went() -> None:
    new = {"epochs": 2, "model": "a/b", "tuning": {"type": "lora", "rank": 16}, "limits": {"hours": 3}}
    assert changes(new, OLD) == [
        (" ", "model: a/b"),
        (" ", "tuning:"),
        (" ", "  type: lora"),
        ("-", "  rank: 8"),
        ("+", "  rank: 16"),
        (" ", "epochs: 2"),
        ("+", "limits:"),
        ("+", "  hours: 3"),
    ]


def test_the_same_in_another_order_is_the_same() -> None:
    assert {mark for mark, _ in changes(dict(reversed(OLD.items())), OLD)} == {" "}
