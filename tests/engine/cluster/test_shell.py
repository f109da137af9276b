"""Text of others stays text, held against a real shell."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetui.engine.cluster.shell import comment, here_document, word, words
from finetui.planner.errors import UserError

#: What a shell has a meaning for, and some that it has not.
TEXT = st.text(st.sampled_from("ab 'é\"$(){}`\\;&|<>*?~!#=%[]-") | st.characters(exclude_categories=["Cc", "Cs"]))


@given(TEXT)
@example("")
@example("$(touch canary)")
@example("it's; rm -rf ~")
def test_a_word_stays_one(text: str) -> None:
    assert shlex.split(word(text)) == [text]
    assert shlex.split(words(text, "--", text)) == [text, "--", text]


@given(st.lists(TEXT, min_size=1, max_size=20))
@settings(max_examples=25)
def test_bash_agrees(texts: list[str]) -> None:
    script = f"printf '%s\\0' {words(*texts)}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == texts


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "\0", "\x1b[31m", "\x7f"])
def test_line_breaks_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="control character"):
        word(text)


@given(st.lists(TEXT | st.sampled_from(["FINETUI_RECIPE", "FINETUI_RECIPE_", "'FINETUI_RECIPE'"]), min_size=1))
@example(["$(echo expanded)", "`echo expanded`", "$HOME ${HOME} \\$HOME", "\\"])
@settings(max_examples=25)
def test_a_file_is_written_as_it_is(lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    script = here_document("/dev/stdout", text) + "echo after"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert done.stdout.decode() == text + "after\n"


@given(TEXT)
def test_a_comment_is_nothing_but_that(text: str) -> None:
    assert all(line.startswith("#") for line in comment(f"{text}\n{text}").split("\n")[:-1])
