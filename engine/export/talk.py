"""Whether an exported model is talked to as it was trained: the same tokens before an answer, the same token after it.

A model behind another template, or one that goes on past the token that it learned to end with, looks badly trained.
Training's side is taken from the code that made the labels; the other from what plain transformers, or llama.cpp, make
of the exported files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...planner.errors import DataError, RunError
from ..data.examples import Example, Message
from ..data.labels import encode
from ..data.template import render
from ..models.load import load_tokenizer
from ..models.remote_code import trusted
from ..run import Run

_SYSTEM, _USER, _ANSWER = "Be brief.", "What is 2 + 2?\nSay  why.", "4, of course."
#: Conversations that are tried; templates without a place for system messages refuse the second.
PROBES: tuple[tuple[Message, ...], ...] = (
    (Message("user", _USER),),
    (Message("system", _SYSTEM), Message("user", _USER)),
    (Message("user", _USER), Message("assistant", _ANSWER), Message("user", "And 3 + 3?")),
)
_DO = "This is a fault of the export, please report it; the run's own output is as it was."


@dataclass(frozen=True)
class Trained:
    """Training's side.

    Args:
        prompts: conversations that the template takes, and the tokens with which the trained tokenizer asks for an
            answer to each.
        end: the token that answers were trained to end with.
        gap: where the template itself asks for answers otherwise than it writes them: how, and what stood in training.
    """

    prompts: tuple[tuple[tuple[Message, ...], tuple[int, ...]], ...]
    end: int
    gap: tuple[str, str] | None = None


def trained(tokenizer: Any, method: str) -> Trained | None:
    """Training's side; None where a model neither talks nor ends.

    Args:
        tokenizer: as training left it.
        method: of the plan.
    """
    if method == "reward":
        return None
    if method == "pretrain" or not tokenizer.chat_template:
        return Trained((), int(tokenizer.eos_token_id))
    prompts: list[tuple[tuple[Message, ...], tuple[int, ...]]] = []
    end, gap = int(tokenizer.eos_token_id), None
    ask = by_transformers(tokenizer)
    for probe in PROBES:
        row = Example("chat", "the probe", messages=(*probe, Message("assistant", _ANSWER)), train_from=len(probe))
        try:
            coded, asked = encode(row, tokenizer), ask(probe)
        except DataError:
            continue
        seen = coded.input_ids[: coded.spans[0][0]]
        if asked != seen:
            alike = next((i for i, (a, b) in enumerate(zip(asked, seen, strict=False)) if a != b), None)
            begin = min(len(asked), len(seen)) if alike is None else alike
            gap = (tokenizer.decode(asked[begin:]), tokenizer.decode(seen[begin:]))
        prompts.append((probe, tuple(asked)))
        special = [i for i in coded.labels if i in tokenizer.added_tokens_decoder]
        end = special[-1] if special else end
    return Trained(tuple(prompts), end, gap)


def same_prompts(before: Trained, exported: Callable[[Sequence[Message]], Sequence[int]]) -> str:
    """Make sure that prompts are the tokens that training's tokenizer makes of them.

    Args:
        exported: the tokens that are put before an answer, by the exported files.

    Returns:
        What was found, for display.

    Raises:
        RunError: they are others.
    """
    for probe, tokens in before.prompts:
        found = tuple(exported(probe))
        if found != tokens:
            alike = (i for i, (a, b) in enumerate(zip(found, tokens, strict=False)) if a != b)
            at = next(alike, min(len(found), len(tokens)))
            what = f"the exported chat template writes other tokens than training saw, from token {at} on"
            raise RunError(what, where="chat template", do=_DO)
    if not before.prompts:
        return "no chat template was trained with"
    if before.gap is None:
        return f"chat template: the same tokens as in training, in {len(before.prompts)} conversations"
    asked, seen = before.gap
    return f"chat template: that of training, which asks for answers with {asked!r} where rows of training had {seen!r}"


def ends_answers(before: Trained, stops: Sequence[int], tokenizer: Any) -> str:
    """Make sure that what ends answers is among the tokens that the exported model stops at.

    Raises:
        RunError: it is not.
    """
    name = tokenizer.convert_ids_to_tokens(before.end)
    if before.end not in stops:
        what = f"answers were trained to end with {name}, at which the exported model does not stop"
        raise RunError(what, where="generation_config.json", do=_DO)
    return f"end of answers: {name} was trained and is stopped at"


def by_transformers(tokenizer: Any) -> Callable[[Sequence[Message]], list[int]]:
    """Prompts as plain transformers makes them."""

    def prompt(messages: Sequence[Message]) -> list[int]:
        text = render(tokenizer, messages, "the probe", prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return prompt


def check_folder(run: Run, folder: Path, exported: Path) -> tuple[str, ...]:
    """Make sure that the exported folder is talked to as training talked, by plain transformers.

    Args:
        folder: the run's result, whose tokenizer training wrote.

    Returns:
        What was found, for display.

    Raises:
        RunError: it is not.
    """
    from transformers import AutoTokenizer

    tokenizer, _ = load_tokenizer(folder)
    before = trained(tokenizer, run.plan.resolved.method)
    if before is None:
        return ()
    plain = AutoTokenizer.from_pretrained(str(exported), trust_remote_code=trusted(folder))
    found = [same_prompts(before, by_transformers(plain))]
    file = exported / "generation_config.json"
    if file.is_file():
        told: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        stops = told.get("eos_token_id")
        listed: list[int] = stops if isinstance(stops, list) else [] if stops is None else [stops]
        found.append(ends_answers(before, listed, tokenizer))
    return tuple(found)
