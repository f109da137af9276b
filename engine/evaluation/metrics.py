"""Plain metrics of an answer against what was expected: exact match, the words in common, the longest common sequence.

Each takes a text and the answers any of which will do, and gives the best value over these. What a word is decides
them, so it is said once: a run of letters and digits without regard to case, and in scripts that write no spaces each
character.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

#: Scripts without spaces between words: Han with its extensions, kana, Thai, Lao, Khmer, Myanmar.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def exact_match(answer: str, expected: Sequence[str]) -> float:
    """1 where the answer is an expected one but for white space and letter case."""
    return float(_plain(answer) in {_plain(one) for one in expected})


def token_f1(answer: str, expected: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the answer's words, order aside (Rajpurkar et al. 2016,
    arXiv:1606.05250, without leaving out articles)."""
    return _best(answer, expected, lambda one, other: sum((Counter(one) & Counter(other)).values()))


def rouge_l(answer: str, expected: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the longest sequence of words that both have in the same order (Lin
    2004, without stemming)."""
    return _best(answer, expected, longest_common)


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, 64 cells of its table at a time and more (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(one)) - 1
    row = every
    for word in other:
        hit = row & places.get(word, 0)
        row = (row + hit | row - hit) & every
    return len(one) - row.bit_count()


def _best(answer: str, expected: Sequence[str], common: Callable[[list[str], list[str]], int]) -> float:
    said = words(answer)
    return max((_harmonic(said, words(one), common) for one in expected), default=0.0)


def _harmonic(said: list[str], wanted: list[str], common: Callable[[list[str], list[str]], int]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    return 2 * common(said, wanted) / (len(said) + len(wanted))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


#: The metrics that every answer gets, by the name of their figure.
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge_l": rouge_l,
}
