"""Trained tokens equal TRL's ``assistant_only_loss`` masks on every template for which TRL has a training version."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.data.examples import Example, Message
from finetui.engine.data.labels import IGNORED, encode
from finetui.engine.data.template import as_dict, prepare_tokenizer, training_template
from finetui.planner.errors import DataError

Make = Callable[..., Any]
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<[a-z_]+\|>|<\|[a-z_]+>|<｜[^<>\s]+｜>|</?[a-z_]+>|\[/?[A-Z_]+\]")
#: Templates of models that also see images take content as a list of parts.
_PARTS = {"idefics3", "llava_next", "smolvlm"}


def _folder() -> Path:
    import trl

    return Path(str(trl.__file__)).parent / "chat_templates"


def _names() -> list[str]:
    marked = (path.name.removesuffix("_training.jinja") for path in _folder().glob("*_training.jinja"))
    return sorted(name for name in marked if (_folder() / f"{name}.jinja").exists())


PLAIN = (Message("user", "What is e?"), Message("assistant", "It is e."))
CHATS: dict[str, tuple[Message, ...]] = {
    "one turn": PLAIN,
    "three turns": (
        *PLAIN,
        Message("user", "And\nthat?"),
        Message("assistant", "A short one.\n\nTwo lines."),
        Message("user", "e"),
        Message("assistant", "e"),
    ),
    "system": (Message("system", "Be short."), *PLAIN),
    "thinking": (*PLAIN, Message("user", "Why?"), Message("assistant", "So.", reasoning="The question is that.")),
}


_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 30}}}
CALLS = (
    Message("user", "What is 12 + 30?"),
    Message("assistant", "", tool_calls=(_CALL,)),
    Message("tool", "42", name="add"),
    Message("assistant", "It is e."),
)
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}}  # fmt: skip


@pytest.fixture
def tokenizer_of(make_tokenizer: Make) -> Make:
    def _tokenizer(name: str) -> Any:
        template = (_folder() / f"{name}.jinja").read_text()
        tokenizer = make_tokenizer(template)
        vocabulary = tokenizer.get_vocab()
        new = sorted({token for token in _SPECIAL.findall(template) if token not in vocabulary})
        tokenizer.add_special_tokens({"additional_special_tokens": new})
        prepare_tokenizer(tokenizer)
        return tokenizer

    return _tokenizer


@pytest.mark.parametrize("name", _names())
def test_masks_equal(tokenizer_of: Make, name: str) -> None:
    tokenizer = tokenizer_of(name)
    marked = (_folder() / f"{name}_training.jinja").read_text()
    compared = []
    for kind, messages in {**CHATS, "tools": CALLS}.items():
        tools = (ADD,) if kind == "tools" else ()
        try:
            ours = encode(Example("chat", "x:1", messages=messages, tools=tools), tokenizer)
        except DataError:  # Gemma has no system role, others no thoughts or tools
            continue
        theirs = tokenizer.apply_chat_template(
            [as_dict(message, parts=name in _PARTS) for message in messages],
            chat_template=marked,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **({"tools": list(tools)} if tools else {}),
        )
        assert ours.input_ids == theirs["input_ids"]
        assert [label != IGNORED for label in ours.labels] == [bool(mark) for mark in theirs["assistant_masks"]]
        assert "e." in tokenizer.decode([label for label in ours.labels if label != IGNORED])
        compared.append(kind)
    assert {"one turn", "three turns"} <= set(compared)
    # The tokenizer itself keeps the template that inference will use.
    assert not re.search(r"\{%-?\s*generation", tokenizer.chat_template) or tokenizer.chat_template == marked


def test_enough_templates_are_compared() -> None:
    assert len(_names()) >= 25


def test_only_the_very_template_is_replaced() -> None:
    original = (_folder() / "qwen3.jinja").read_text()
    assert training_template(original) != original
    assert training_template(original + " ") == original + " "


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2_5", "glm4moe"])
def test_tool_calls_are_answers_and_their_results_are_not(tokenizer_of: Make, name: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 30}}}
    messages = (
        Message("user", "What is 12 + 30?"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "result 42", name="add"),
        Message("assistant", "It is 42."),
    )
    tools = ({"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}},)
    tokenizer = tokenizer_of(name)
    example = Example("chat", "x:1", messages=messages, tools=tools)
    if name == "llama3":
        with pytest.raises(DataError, match=r"x:1: the chat template has no place for tool calls"):
            encode(example, tokenizer)
        return
    encoded = encode(example, tokenizer)
    trained = tokenizer.decode([label for label in encoded.labels if label != IGNORED])
    assert "add" in trained
    assert "It is 42." in trained
    for text in ("result", "Adds.", "What"):
        assert text in tokenizer.decode(encoded.input_ids)
        assert text not in trained
    last = encode(example, tokenizer, train_on="last-answer")
    assert last.labels == encoded.labels  # the call belongs to the answer to the last question
