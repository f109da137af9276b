"""A run by the beginning of its name: only where no other run's begins so, and never a guess."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from finetui.engine.named import named
from finetui.planner.errors import RunError


@dataclass
class Fake:
    name: str
    at: int = 0


RUNS = [Fake(name) for name in ("tiny-full-2", "tiny-full", "qwen3-8b-qlora", "align.2-dpo", "align.1-sft", "align")]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("tiny-full", "tiny-full"),
        ("q", "qwen3-8b-qlora"),
        ("tiny-full-", "tiny-full-2"),
        ("al", "align"),
        ("align.1", "align.1-sft"),
    ],
)
def test_as_much_of_a_name_as_is_needed(word: str, meant: str) -> None:
    found = named(RUNS, word)
    assert found is not None
    assert found.name == meant


@pytest.mark.parametrize("word", ["", "lora", "TINY", "/runs/tiny-full"])
def test_what_begins_no_name_is_none(word: str) -> None:
    assert named(RUNS, word) is None


def test_several_are_named_and_none_is_taken() -> None:
    with pytest.raises(RunError) as told:
        named(RUNS, "tiny", where="ada@box")
    assert told.value.what == "the names of 2 runs begin with 'tiny'"
    assert told.value.where == "ada@box"
    assert told.value.do == "Type more of its name: tiny-full-2, tiny-full."


def test_stages_without_their_run_are_several() -> None:
    with pytest.raises(RunError, match=r"2 runs begin with 'align\.'"):
        named(RUNS, "align.")


def test_a_long_list_says_how_many_more() -> None:
    with pytest.raises(RunError, match=r"r5 and 4 more\."):
        named([Fake(f"r{number}") for number in range(10)], "r")


def test_of_two_of_one_name_the_newer() -> None:
    found = named([Fake("same", 2), Fake("same", 1), Fake("other")], "sa")
    assert found is not None
    assert found.at == 2
