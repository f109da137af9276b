"""What the model answers to a few held-out prompts: the figure in a run that needs no explanation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .data.examples import Message
from .data.template import render
from .evaluate import IGNORED
from .events import Sample
from .models.load import Emit

#: How many prompts are asked.
PROMPTS = 3
#: For how long all answers together may take: the first step of a run should not wait for them.
SECONDS_BEFORE, SECONDS_AFTER = 3.0, 20.0
_PROBE = "FinetuiProbe"


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt and the answer that the data gives."""

    ids: list[int]
    expected: list[int]


def held_out_prompts(rows: Any, count: int = PROMPTS) -> list[Prompt]:
    """The first ``count`` different prompts of tokenised rows, none without rows: what stands before the answer.

    The answer is the first trained span; of a pair the better one; of judged answers a good one. Where everything is
    trained on (plain text), the first half is the prompt.
    """
    prompts: list[Prompt] = []
    for index in range(min(0 if rows is None else len(rows), 4 * count)):
        prompt = _prompt_of(rows[index])
        if prompt is not None and all(prompt.ids != other.ids for other in prompts):
            prompts.append(prompt)
        if len(prompts) == count:
            break
    return prompts


def _prompt_of(row: Any) -> Prompt | None:
    if "prompt_ids" in row:
        expected = row["chosen_ids"] if "chosen_ids" in row else row.get("completion_ids") or []
        return Prompt(list(row["prompt_ids"]), list(expected)) if row.get("label", True) else None
    length = (row.get("seq_lengths") or [len(row["input_ids"])])[0]
    ids, labels = row["input_ids"][:length], row["labels"][:length]
    start = next((i for i, label in enumerate(labels) if label != IGNORED), length)
    if start <= 1:
        start = length // 2
    end = next((i for i in range(start, length) if labels[i] == IGNORED), length)
    return Prompt(list(ids[:start]), list(ids[start:end])) if 0 < start < end else None


def answer(
    model: Any, tokenizer: Any, prompts: list[Prompt], step: int, emit: Emit, context: Any, *, together: bool = False
) -> None:
    """Answer greedily and emit one Sample per prompt; prompts that there is no time for are left out.

    Args:
        together: all ranks answer the same prompts, each with a part of the model.
    """
    training = model.training
    model.eval()
    wishes: dict[str, Any] = {"synced_gpus": True} if together else {}  # which a model's own generate need not know
    if getattr(getattr(model, "generation_config", None), "cache_implementation", None) is not None:
        wishes["disable_compile"] = True  # which takes minutes, and what it made would be of a model that trains on
    try:
        with torch.no_grad(), context:
            for prompt in prompts:
                ids = torch.tensor([prompt.ids], device=next(model.parameters()).device)
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=min(96, len(prompt.expected) + 16),
                    max_time=(SECONDS_AFTER if step else SECONDS_BEFORE) / len(prompts),
                    use_cache=True,
                    **wishes,
                )

                told = _text(tokenizer, out[0, len(prompt.ids) :].tolist())
                emit(Sample(step, question(tokenizer, prompt.ids), told, _text(tokenizer, prompt.expected)))
    finally:
        model.train(training)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def question(tokenizer: Any, ids: list[int]) -> str:
    """What the user asks in a prompt, without what the chat template puts around it."""
    if tokenizer.chat_template:
        frame = render(tokenizer, [Message("user", _PROBE)], "chat template", prompt=True)
        before, _, after = frame.partition(_PROBE)
        whole = str(tokenizer.decode(ids))
        if after and whole.startswith(before) and whole.endswith(after):
            return whole.removeprefix(before).removesuffix(after).strip()
    return _text(tokenizer, ids)
