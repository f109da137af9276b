"""Tokenizers made ready: template, end token, pad token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.data.examples import Message
from finetui.engine.data.template import has_markers, prepare_tokenizer, render, stop_token_ids
from finetui.planner.errors import DataError, ModelError

Make = Callable[..., Any]
CHAT = [Message("user", "q"), Message("assistant", "a")]


def test_chatml_where_there_is_no_template(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    notes = prepare_tokenizer(tokenizer)
    assert notes == ("chat template: ChatML with <|im_end|> at the end of a turn, because the tokenizer has none",)
    assert render(tokenizer, CHAT, "x") == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert render(tokenizer, CHAT[:1], "x", prompt=True) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert has_markers(tokenizer.chat_template)


def test_chatml_ends_with_eos_where_the_vocabulary_lacks_its_end() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    notes = prepare_tokenizer(tokenizer)
    assert render(tokenizer, CHAT, "x").endswith("assistant\na</s>\n")
    assert notes[1].startswith("pad token: </s>, for want of a free one")


@pytest.mark.parametrize(
    ("pad", "expected"), [("<pad>", "<pad>"), ("</s>", "<pad>"), (None, "<pad>"), ("<|im_end|>", "<pad>")]
)
def test_pad_is_never_what_ends_an_answer(make_tokenizer: Make, pad: str | None, expected: str) -> None:
    tokenizer = make_tokenizer(pad_token=pad)
    notes = prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == expected
    assert any("pad token" in note for note in notes) == (pad != expected)


def test_stop_tokens(make_tokenizer: Make, family: Any) -> None:
    tokenizer = make_tokenizer(family.template)
    ends = {tokenizer.eos_token_id}
    if family.closing.strip():
        ends.add(tokenizer.convert_tokens_to_ids(family.closing))
    assert set(stop_token_ids(tokenizer)) == ends


def test_end_token_is_found_or_missed_aloud(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(eos_token=None)
    assert prepare_tokenizer(tokenizer)[0] == "end token: </s>, because the tokenizer names none"
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        prepare_tokenizer(bare)


def test_template_files(make_tokenizer: Make, write: Callable[[str, str | bytes], str]) -> None:
    tokenizer = make_tokenizer()
    path = write("mine.jinja", "{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}")
    assert prepare_tokenizer(tokenizer, path)[0] == "chat template: mine.jinja"
    assert render(tokenizer, CHAT, "x") == "user=q;assistant=a;"
    with pytest.raises(DataError, match=r"bad\.jinja: the chat template refuses"):
        prepare_tokenizer(tokenizer, write("bad.jinja", "{% for m in %}"))
    with pytest.raises(DataError, match=r"gone\.jinja: the chat template can't be read"):
        prepare_tokenizer(tokenizer, path.replace("mine", "gone"))


def test_a_template_that_raises_names_the_row(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('no system, please') }}")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*no system, please"):
        render(tokenizer, CHAT, "rows.jsonl:3")


def test_a_later_system_message_is_written_or_missed_aloud(make_tokenizer: Make) -> None:
    turns = [Message("system", "be brief"), *CHAT, Message("system", " be brief "), Message("user", "r")]
    writes = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }};{% endfor %}"
    assert render(make_tokenizer(writes), turns, "x:1").endswith("<system>be brief;<user>r;")
    drops = "{% for m in messages %}{% if loop.first or m.role != 'system' %}{{ m.content }};{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"x:1: the chat template leaves out message 4, a system message after"):
        render(make_tokenizer(drops), turns, "x:1")


def test_templates_by_name(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    assert prepare_tokenizer(tokenizer, "chatml")[0].startswith("chat template: ChatML with <|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin_of_text|>"]})
    assert prepare_tokenizer(tokenizer, "llama3")[0] == "chat template: that of llama3"
    told = render(tokenizer, [Message("user", "a"), Message("assistant", "b")], "x:1")
    assert "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>" in told
    with pytest.raises(DataError, match=r"no token <\|CHATBOT_TOKEN\|>.* which the template of cohere writes"):
        prepare_tokenizer(make_tokenizer(), "cohere")
    with pytest.raises(DataError, match=r"no chat template called 'llama'\. Use chatml, llama3"):
        prepare_tokenizer(make_tokenizer(), "llama")


def test_a_name_in_a_recipe_is_no_path(tmp_path: Path) -> None:
    from finetui.planner.recipe import Recipe

    (tmp_path / "r.yaml").write_text("model: m\nchat_template: llama3\n")
    assert Recipe.load(tmp_path / "r.yaml").chat_template == "llama3"
    (tmp_path / "r.yaml").write_text("model: m\nchat_template: own.jinja\n")
    assert Recipe.load(tmp_path / "r.yaml").chat_template == str(tmp_path / "own.jinja")
