"""Tokenizers in GGUF: llama.cpp makes the same tokens where it is here; what it would cut otherwise is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoConfig

from finetui.engine.data.examples import Message
from finetui.engine.data.template import render
from finetui.engine.export import gguf_tokenizer, source
from finetui.engine.export.exported import say_nothing
from finetui.engine.export.gguf_file import lay_out, write
from finetui.engine.export.gguf_tokenizer import NASTY, UNUSED, describe, plain_template
from finetui.planner.errors import ModelError

Make = Callable[..., Any]
ROWS = 520
CHAT = (Message("user", "Hello  there\n"), Message("assistant", " x"), Message("user", "I'm\tyou 12345"))


def cut(rule: tuple[str, ...]) -> Any:
    """A pre-tokenizer by the name or regular expression that the rules are listed under."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in rule)
    if rule[0] == "digit":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    if rule[0] == "gpt2":
        return bytes_
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule[0]), "isolated"), bytes_])


@pytest.fixture
def in_llama_cpp(family: Make, llama_cpp: Make, tmp_path: Path) -> Make:
    """Loads a tokenizer in llama.cpp, beside a model that has a few rows too many."""

    def load(tokenizer: Any) -> Any:
        _, folder = family("llama", vocab_size=ROWS)
        found = source.of_folder(folder)
        layout = lay_out(AutoConfig.from_pretrained(folder), tokenizer, found.shapes, "f16", torch.float32, "a model")
        write(layout, found, tmp_path / "m.gguf", say_nothing)
        return llama_cpp(tmp_path / "m.gguf")

    return load


@pytest.mark.parametrize(("rule", "name"), gguf_tokenizer._RULES.items(), ids=gguf_tokenizer._RULES.values())
def test_llama_cpp_cuts_text_by_the_rule_of_that_name(
    rule: tuple[tuple[str, ...], bool], name: str, byte_level: Make, in_llama_cpp: Make
) -> None:
    tokenizer = byte_level(cut(rule[0]), ignore_merges=rule[1])
    loaded = in_llama_cpp(tokenizer)
    for text in (*NASTY, "call <tool> now", render(tokenizer, CHAT, "the chat", prompt=True)):
        assert loaded.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    assert loaded.ends() == set(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))


@pytest.mark.parametrize("before", ["never", "prepend", "first", "always"])
def test_llama_cpp_merges_by_scores(before: str, sentencepiece: Make, in_llama_cpp: Make) -> None:
    tokenizer = sentencepiece(before)
    loaded = in_llama_cpp(tokenizer)
    begin = "<|im_start|>" if before == "first" else ""  # where conversations begin, which alone it is right for
    for text in (*NASTY, render(tokenizer, CHAT, "the chat", prompt=True)):
        if before == "always" and text.startswith(" "):
            continue
        whole = begin + text
        assert loaded.tokens(whole) == tokenizer(whole, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize(("rule", "name"), gguf_tokenizer._RULES.items(), ids=gguf_tokenizer._RULES.values())
def test_a_rule_is_found_by_what_it_does(rule: tuple[tuple[str, ...], bool], name: str, byte_level: Make) -> None:
    words = describe(byte_level(cut(rule[0]), ignore_merges=rule[1]), ROWS, [2, 4]).metadata
    assert (words["ggml.model"], words["ggml.pre"]) == ("gpt2", name)
    assert (words["ggml.eos_token_id"], words["ggml.eot_token_id"]) == (2, 4)
    assert words["ggml.tokens"][ROWS - 1] == f"[PAD{ROWS - 1}]"
    assert words["ggml.token_type"][ROWS - 1] == UNUSED
    assert len(set(words["ggml.tokens"])) == ROWS


@pytest.mark.parametrize("before", ["never", "prepend", "first", "always"])
def test_scores_give_the_tokens_that_merges_do(before: str, sentencepiece: Make) -> None:
    found = describe(sentencepiece(before), ROWS, [3])
    assert found.metadata["ggml.model"] == "llama"
    assert found.metadata["ggml.add_space_prefix"] is (before in ("prepend", "always"))
    assert any("begins with one" in note for note in found.notes) is (before == "always")


def test_what_would_be_cut_otherwise_is_refused(byte_level: Make, sentencepiece: Make) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    refused = {
        "no name for how": byte_level(cut((r"\p{L}+|\s+",))),
        "cuts text in a way": byte_level(pre_tokenizers.Punctuation()),
        "changes text first": byte_level(normalizer=normalizers.Lowercase()),
        "other tokens of": sentencepiece(cut=pre_tokenizers.Split("t", "isolated")),
        "kind WordLevel": PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")), eos_token="</s>"
        ),
    }
    for why, tokenizer in refused.items():
        with pytest.raises(ModelError, match=why) as caught:
            describe(tokenizer, ROWS, [2])
        assert "convert_hf_to_gguf.py" in caught.value.do


def test_what_llama_cpp_does_otherwise_is_told(byte_level: Make) -> None:
    from tokenizers import AddedToken

    tokenizer = byte_level(normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken("<sep>", rstrip=True, special=True)])
    notes = describe(tokenizer, ROWS, [2, 4]).notes
    assert any("NFC" in note for note in notes)
    assert any("white space beside <sep>" in note for note in notes)


def test_tokens_that_swallow_space_as_those_of_phi_3_do_are_known_by_the_name(byte_level: Make) -> None:
    from tokenizers import AddedToken

    tokenizer = byte_level()
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {"<s>", "<unk>", "<|endoftext|>"}
    special = [token["content"] for token in told["added_tokens"]] + ["<unk>", "<|endoftext|>"]
    tokenizer.add_tokens([AddedToken(text, rstrip=text not in kept, special=True) for text in special])
    for row in (json.loads(tokenizer.backend_tokenizer.to_str()),):
        assert gguf_tokenizer._strips(_swallowing(row, kept), ROWS, set(special), notes := [])
    assert notes == []


def _swallowing(told: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    rows = [token | {"rstrip": token["content"] not in kept} for token in told["added_tokens"]]
    return told | {"added_tokens": rows}


def test_a_begin_is_put_where_conversations_have_one(byte_level: Make) -> None:
    tokenizer = byte_level()
    assert describe(tokenizer, ROWS, [2]).metadata["ggml.add_bos_token"] is False
    tokenizer.chat_template = "{{- bos_token -}}" + tokenizer.chat_template
    found = describe(tokenizer, ROWS, [2])
    assert found.metadata["ggml.add_bos_token"] is True
    assert any("text begins with <s>" in note for note in found.notes)


def test_templates_are_written_without_marks_for_training(byte_level: Make) -> None:
    tokenizer = byte_level()
    plain = plain_template(tokenizer.chat_template)
    assert "generation -" in tokenizer.chat_template
    assert "generation -" not in plain.replace("add_generation_prompt -", "")
    assert render(tokenizer, CHAT, "the chat", template=plain) == render(tokenizer, CHAT, "the chat")
