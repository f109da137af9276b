"""Metrics of answers, against numbers made by hand and against the definition of a longest common subsequence."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetui.engine.evaluation.metrics import exact_match, longest_common, rouge_l, token_f1, words


def test_words() -> None:
    assert words("Hello, wörld_12!  It's 3.5") == ["hello", "wörld", "12", "it", "s", "3", "5"]
    assert words("東京 is big") == ["東", "京", "is", "big"]
    assert words("ＡＢ") == ["ab"]
    assert words("…") == []


def test_numbers_made_by_hand() -> None:
    assert exact_match("  The\ncat ", ["the CAT"]) == 1.0
    assert exact_match("the cat", ["the dog", "a cat"]) == 0.0
    assert token_f1("the cat sat", ["the cat ran away"]) == pytest.approx(2 * 2 / (3 + 4))
    assert token_f1("a a a", ["a"]) == pytest.approx(2 * 1 / (3 + 1))  # a word counts as often as both have it
    assert rouge_l("police killed the gunman", ["police kill the gunman"]) == 0.75  # Lin 2004, section 3
    assert rouge_l("the gunman kill police", ["police kill the gunman"]) == 0.5
    assert token_f1("the gunman kill police", ["police kill the gunman"]) == 1.0
    assert rouge_l("b", ["a", "b"]) == 1.0  # any of several will do
    assert rouge_l("", [""]) == 1.0
    assert rouge_l("", ["a"]) == token_f1("a", []) == 0.0


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    @lru_cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        if one[i] == other[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    assert longest_common(one, other) == longest(0, 0)
