"""Rows of embeddings in one order, and words that only some models have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetui.engine.merge.sources import Checkpoint
from finetui.engine.merge.vocabulary import Vocabulary, align, differences, vocabulary_of, with_words
from finetui.planner.errors import ModelError

A = Vocabulary({"a": 0, "b": 1, "<x>": 2}, {"<x>": {"id": 2, "content": "<x>"}})
B = Vocabulary({"b": 0, "a": 1, "<y>": 2}, {"<y>": {"id": 2, "content": "<y>", "special": True}})


def rows(*values: float) -> torch.Tensor:
    return torch.tensor([[float(value)] for value in values])


def test_base_keeps_the_first_models_words_and_order() -> None:
    order = align(["A", "B"], [A, B], [4, 3], "base")
    one, two = order.apply([rows(1, 2, 3, 9), rows(20, 10, 30)], [0, 1])
    assert one.flatten().tolist() == [1, 2, 3, 9]
    assert two.flatten().tolist() == [10, 20, 3, 9]  # what B lacks is as in A, also the row without a word
    assert order.new == []


def test_union_adds_the_words_of_the_others() -> None:
    order = align(["A", "B"], [A, B], [4, 3], "union")
    assert order.count == 4  # the spare row is used
    one, two = order.apply([rows(1, 2, 3, 9), rows(20, 10, 30)], [0, 1])
    assert one.flatten().tolist() == [1, 2, 3, 30]  # the only model that has <y> gives its row
    assert two.flatten().tolist() == [10, 20, 3, 30]
    assert order.new == [{"id": 3, "content": "<y>", "special": True}]
    assert align(["A", "B"], [A, B], [3, 3], "union").count == 4


def test_a_word_that_the_first_lacks_is_the_mean_of_the_others() -> None:
    c = Vocabulary({"a": 0, "<y>": 1}, B.added)
    order = align(["A", "B", "C"], [A, B, c], [3, 3, 2], "union")
    one, *_ = order.apply([rows(1, 2, 3), rows(20, 10, 30), rows(100, 50)], [0, 1, 2])
    assert one.flatten().tolist() == [1, 2, 3, 40]


def test_vocabularies_that_were_built_apart_cannot_be_joined() -> None:
    other = Vocabulary({"a": 0, "zebra": 1})
    with pytest.raises(ModelError, match="'zebra' is a word of B and not of A"):
        align(["A", "B"], [A, other], [3, 2], "union")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        align(["A", "B"], [A, None], [3, 2], "base")
    with pytest.raises(ModelError, match="2 rows"):
        align(["A", "B"], [A, B], [3, 2], "base")


def test_differences() -> None:
    assert "'b' is word 1 of A and 0 of B, as are 1 others" in differences(["A", "B"], [A, B])[1]
    more = Vocabulary(A.ids | {"<z>": 3})
    assert differences(["A", "B"], [A, more]) == (["B has 1 words that A lacks (<z>)"], "")
    assert differences(["A", "B"], [None, None]) == ([], "")
    assert "B has no tokenizer.json" in differences(["A", "B"], [A, None])[0][0]
    assert "A has no tokenizer.json" in differences(["A", "B"], [None, B])[0][0]


def test_words_of_a_folder_and_more_of_them(tmp_path: Path) -> None:
    assert vocabulary_of(Checkpoint("m", tmp_path)) is None
    tree = {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"id": 2, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert vocabulary_of(Checkpoint("m", tmp_path)) == A
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    changed = with_words(tmp_path, [{"id": 3, "content": "<y>", "special": True}])
    assert [entry["id"] for entry in changed["tokenizer.json"]["added_tokens"]] == [2, 3]
    told = changed["tokenizer_config.json"]["added_tokens_decoder"]
    assert told == {"3": {"content": "<y>", "special": True}}
