"""Verifiable rewards on text: whether a completion holds the right answer, in the right form.

Each takes completions and, where it compares, what the rows say is right: one answer, or a list of answers any of which
will do. It gives 1 or 0 per completion, or None where a row has nothing to compare with. They run in the reward process
(``host.py``), so that an expression that backtracks for ever is stopped like any other reward that hangs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
#: The last line of GSM8K's solutions, and the closing words that models are asked for most.
_MARKED = re.compile(r"####\s*(.+?)\s*$|(?:final\s+)?answer\s*(?:is|:|=)[\s:]*(.+?)\s*$", re.MULTILINE | re.IGNORECASE)
_NUMBER = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*[-+]?\d+(?:\.\d+)?)?%?"
)


def final_answer(text: str) -> str:
    """What a completion gives as its answer: ``<answer>…</answer>``, else the last ``\\boxed{…}``, else what follows
    the last ``####`` or ``answer is``, else all of it."""
    if tagged := _TAGGED.findall(text):
        return str(tagged[-1]).strip()
    if boxed := _boxed(text):
        return boxed.strip()
    if marked := _MARKED.findall(text):
        return next(part for part in reversed(marked[-1]) if part or part == marked[-1][0]).strip().rstrip(".")
    return text.strip()


def _boxed(text: str) -> str:
    """The content of the last ``\\boxed{…}``, whose braces may be nested; empty if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, begin = 1, start + len("\\boxed{")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[begin:position]
    return ""


def accepted(right: Any) -> list[Any]:
    """What a row says is right, as a list; empty where it says nothing."""
    return [answer for answer in (right if isinstance(right, list) else [right]) if answer is not None]


def exact_answer(completions: Sequence[str], right: Sequence[Any]) -> list[float | None]:
    """1 where the final answer is a right one, but for letter case and white space."""
    told: list[float | None] = []
    for text, answer in zip(completions, right, strict=True):
        wanted = {_plain(final_answer(str(one))) for one in accepted(answer)}
        told.append(float(_plain(final_answer(text)) in wanted) if wanted else None)
    return told


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def numeric(completions: Sequence[str], right: Sequence[Any], tolerance: float = 1e-6) -> list[float | None]:
    """1 where the last number of the final answer is a right number, within a relative ``tolerance``."""
    told: list[float | None] = []
    for text, answer in zip(completions, right, strict=True):
        numbers = (last_number(final_answer(str(one))) for one in accepted(answer))
        wanted = [number for number in numbers if number is not None]
        if not wanted:
            told.append(None)
            continue
        found = last_number(final_answer(text))
        near = found is not None and any(math.isclose(found, n, rel_tol=tolerance, abs_tol=1e-9) for n in wanted)
        told.append(float(near))
    return told


def last_number(text: str) -> float | None:
    """The last number of a text: ``1,234.5``, ``-3e4``, ``2/3``, ``40%`` (0.4); None without one."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    word = str(found[-1]).replace(",", "").replace(" ", "")
    try:
        value = float(Fraction(*map(Fraction, word.rstrip("%").split("/"))) if "/" in word else word.rstrip("%"))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return value / 100 if word.endswith("%") else value


def matches(completions: Sequence[str], pattern: str) -> list[float | None]:
    """1 where a regular expression is found anywhere in the completion; ``.`` matches line ends too."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.search(text) is not None) for text in completions]


def code_of(text: str) -> str:
    """The last fenced block of a completion, or all of it."""
    blocks = re.findall(r"```[\w+-]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return str(blocks[-1]) if blocks else text
