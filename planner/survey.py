"""What rows of answers say about how to learn from them: pairs without a difference, answers that win by their length,
verdicts of which one is rare. Shapes of rows are TRL's ("dataset formats")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

#: What the data is: texts, examples to imitate, chosen and rejected answers, single answers with a verdict, or prompts
#: whose answers can be checked.
DataKind = Literal["text", "examples", "pairs", "labels", "checkable", "unknown"]

#: Chosen answers this much longer than rejected ones are remarked on; that DPO learns length is arXiv:2403.19159, where
#: much begins is our choice.
_LONGER = 1.5
#: Weight times number of good answers over that of bad ones should lie between these (arXiv:2402.01306, equation 8).
_BALANCE = (1.0, 4 / 3)
#: Share of prompts with both verdicts from which pairs can be made of them.
_BOTH = 0.5


@dataclass(frozen=True)
class Remark:
    """Something about the rows, what to do about it, and what that rests on."""

    what: str
    do: str
    source: str
    settings: Mapping[str, Any] | None = None


def kind_of_rows(rows: Sequence[Mapping[str, Any]]) -> DataKind:
    """What rows are, by the keys that all of them have; case does not matter."""
    if not rows:
        return "unknown"
    keys = set.intersection(*({key.lower() for key in row} for row in rows))
    if {"chosen", "rejected"} <= keys:
        return "pairs"
    if "label" in keys and {"completion", "response", "answer"} & keys:
        return "labels"
    if {"messages", "conversations", "completion", "output", "response"} & keys:
        return "examples"
    if {"prompt", "question", "problem"} & keys and {"answer", "solution", "ground_truth"} & keys:
        return "checkable"
    return "text" if "text" in keys else "unknown"


def survey(rows: Sequence[Mapping[str, Any]]) -> list[Remark]:
    """Remarks on preference rows; none for other kinds, and none where all is well."""
    kind = kind_of_rows(rows)
    lower = [{key.lower(): value for key, value in row.items()} for row in rows]
    if kind == "pairs":
        return _pairs(lower)
    return _verdicts(lower) if kind == "labels" else []


def _pairs(rows: list[dict[str, Any]]) -> list[Remark]:
    remarks = []
    same = sum(row["chosen"] == row["rejected"] for row in rows)
    if same:
        what = f"{same} of {len(rows)} pairs have the same answer twice: their gradient is zero"
        remarks.append(Remark(what, "leave them out", "arXiv:2305.18290 (DPO), equation 7"))
    chosen, rejected = (sum(len(_text(row[name])) for row in rows) for name in ("chosen", "rejected"))
    if rejected and chosen > _LONGER * rejected:
        what = f"chosen answers are {chosen / rejected:.1f} times as long as rejected ones: DPO would learn length"
        do = "add pairs whose better answer is the shorter one, or use simpo, whose reward is per token"
        remarks.append(Remark(what, do, "arXiv:2403.19159; arXiv:2405.14734 (SimPO)"))
    return remarks


def _verdicts(rows: list[dict[str, Any]]) -> list[Remark]:
    good = sum(bool(row["label"]) for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        missing = "good" if not good else "bad"
        what = f"no answer is marked {missing}: there is nothing to tell apart"
        do = "collect some, or use sft on the good ones" if good else "collect some"
        return [Remark(what, do, "arXiv:2402.01306 (KTO)")]
    remarks = []
    low, high = _BALANCE
    if not low <= good / bad <= high:
        rare, weight = ("desirable", bad / good) if good < bad else ("undesirable", good / bad)
        what = f"{good} good and {bad} bad answers: the rarer verdict would hardly count"
        settings = {"method": "kto", f"preference.{rare}_weight": round(weight, 2)}
        remarks.append(Remark(what, f"weigh {rare} ones {weight:.2f}", "arXiv:2402.01306 (KTO), equation 8", settings))
    verdicts: dict[str, Counter[bool]] = {}
    for row in rows:
        if prompt := _text(row.get("prompt") or row.get("question")):
            verdicts.setdefault(prompt, Counter())[bool(row["label"])] += 1
    both = sum(len(counter) == 2 for counter in verdicts.values())
    if verdicts and both >= _BOTH * len(verdicts):
        what = f"{both} of {len(verdicts)} prompts have a good and a bad answer"
        do = "make pairs of them and use dpo, whose signal is the difference itself"
        remarks.append(Remark(what, do, "arXiv:2305.18290 (DPO); arXiv:2402.01306, section 4"))
    return remarks


def _text(value: Any) -> str:
    """Text of a plain answer, or of the messages of a conversation."""
    if isinstance(value, list):
        return " ".join(str(turn.get("content", "")) if isinstance(turn, Mapping) else str(turn) for turn in value)
    return str(value or "")
