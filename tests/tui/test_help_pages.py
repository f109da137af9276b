"""Help pages: nothing is cut off, and what an option takes is a word, not a type of Python's."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from finetui.tui.cli import VERBS
from finetui.tui.verbs import build


def page(*words: str) -> str:
    verbs = {words[0]: VERBS[words[0]]} if words else VERBS
    result = CliRunner().invoke(build(verbs), [*words, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def test_each_verb_is_told_in_a_line() -> None:
    listed = page().partition("Commands:")[2].splitlines()
    told = {line.split()[0]: line for line in listed if line.strip()}
    assert list(told) == list(VERBS)
    assert [line for line in told.values() if line.rstrip().endswith("...")] == []


@pytest.mark.parametrize("verb", VERBS)
def test_what_options_take(verb: str) -> None:
    options = page(verb).partition("Options:")[2]
    assert "<str" not in options
    assert "<int" not in options
    assert "list[" not in options
    assert "[[" not in page(verb)
