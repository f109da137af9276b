"""Conversations filled into blanks are, to the letter, those that the template writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.data.examples import Example, Message
from finetui.engine.data.labels import end_tokens, mark
from finetui.engine.data.skeleton import Blanks, Mismatch
from finetui.engine.data.template import prepare_tokenizer
from finetui.engine.data.tokens import Marked
from finetui.planner.errors import DataError

Make = Callable[..., Any]
#: What templates look for, strip, escape and measure.
WORDS = [
    "It is", "e.", "<think>x</think>", " ", "\n", "\n\n", "</think>", "hello", "[INST]", "'q'", '"', "\\", "<|im_end|>",
    "<tool_response>", "answer", "user", "  pad  ", "é", "\t", "{{ x }}", "&lt;",
]  # fmt: skip


def conversations(count: int) -> list[Example]:
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices(WORDS, k=draw.randint(1, 4)))

    made = []
    for number in range(count):
        messages = [Message("system", text())] if number % 5 == 0 else []
        for _ in range(draw.choice([1, 1, 2, 3])):
            messages += [Message("user", text()), Message("assistant", text() + draw.choice(["", "a"]))]
        made.append(Example("chat", f"x:{number}", messages=tuple(messages)))
    return made


class Counted:
    """Marks by rendering, and counts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.ends, self.calls = tokenizer, end_tokens(tokenizer), 0

    def __call__(self, example: Example) -> Marked:
        self.calls += 1
        return mark(example, self.tokenizer, "answers", self.ends)


def compare(tokenizer: Any, count: int = 150) -> int:
    """How many conversations were written without rendering them; all must be as if they had been rendered."""
    rendered, counted = Counted(tokenizer), Counted(tokenizer)
    blanks = Blanks(tokenizer, counted, counted.ends)
    filled = 0
    for example in conversations(count):
        try:
            wanted = rendered(example)
        except DataError:
            with pytest.raises(DataError):
                blanks.mark(example)
            continue
        before = counted.calls
        assert blanks.mark(example) == wanted
        filled += counted.calls == before
    return filled


def test_every_family(make_tokenizer: Make, family: Any) -> None:
    tokenizer = make_tokenizer(family.template)
    prepare_tokenizer(tokenizer)
    assert compare(tokenizer) > 10


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "glm4moe", "gptoss", "deepseekv3", "nemotron_3_nano", "gemma3"])
def test_templates_that_look_into_contents(make_tokenizer: Make, name: str) -> None:
    import trl

    template = (Path(str(trl.__file__)).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = make_tokenizer(template)
    prepare_tokenizer(tokenizer)
    compare(tokenizer)


BLANKLESS = {
    "measures": "{% if m['content'] | length > 6 %}{{ 'long: ' }}{% endif %}",
    "takes apart": "{{ m['content'][:2] }}",
    "compares a letter": "{% if m['content'][0] == 'I' %}{{ 'I! ' }}{% endif %}",
}


@pytest.mark.parametrize("what", BLANKLESS)
def test_templates_that_measure_contents_are_rendered(make_tokenizer: Make, what: str) -> None:
    template = "{% for m in messages %}" + BLANKLESS[what] + "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    assert compare(make_tokenizer(template)) == 0


def test_a_template_that_deceives_is_found_out(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    counted = Counted(tokenizer)
    blanks = Blanks(tokenizer, counted, counted.ends)
    example = Example("chat", "x:1", messages=(Message("user", "q"), Message("assistant", "a")))
    blanks.mark(example)
    blanks._render = lambda _: Marked("another text", ())
    with pytest.raises(Mismatch):
        blanks.mark(example)


def test_the_whole_is_rendered_again_after_that(
    write: Any, tmp_path: Path, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from finetui.engine.data.prepare import prepare
    from finetui.engine.data.prepared import DataSettings
    from finetui.planner.recipe import Recipe

    rows = "".join(json.dumps({"instruction": f"What is {i}?", "output": f"{i}."}) + "\n" for i in range(30))
    recipe = Recipe.build({"model": "m", "data": write("x.jsonl", rows)})
    wanted = prepare(recipe, DataSettings(64), make_tokenizer(), tmp_path / "a").train[:]
    asked = []

    def deceived(self: Blanks, example: Example) -> Marked:
        asked.append(example)
        if len(asked) > 20:
            raise Mismatch
        return Marked("wrong", ((0, 5),))

    monkeypatch.setattr(Blanks, "mark", deceived)
    assert prepare(recipe, DataSettings(64), make_tokenizer(), tmp_path / "b").train[:] == wanted
    assert len(asked) == 21
