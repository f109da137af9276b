"""Answers to prompts, many at a time, the same whatever shares their batch.

Prompts are padded on the left and masked, and answers end at the tokens that end a turn of the chat template. Greedy by
default. Sampling draws one Gumbel number per word, row and step from a generator of the row's own: the largest sum of
score / temperature and that number is a sample of the softmax (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030), and
no row's draw depends on its neighbours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.template import stop_token_ids
from .batches import Batches, Told
from .rows import Question
from .voices import Voice


@dataclass(frozen=True)
class Generation:
    """How answers are made. At temperature 0 the likeliest word is taken each time; ``seed`` counts only above it."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What was said, in how many tokens; ``cut`` where it did not end by itself."""

    text: str
    tokens: int
    cut: bool


def answer_all(
    voice: Voice, questions: Sequence[Question], generation: Generation, batches: Batches, told: Told
) -> list[Answer]:
    """An answer to each question.

    Raises:
        HardwareError: memory runs out over a single question.
    """
    stops = stop_token_ids(voice.tokenizer)

    def work(chosen: list[int]) -> list[Answer]:
        ids, mask = _padded([questions[i].ids for i in chosen], voice.tokenizer.pad_token_id)
        noise = [_Gumbel(generation, chosen)] if generation.temperature > 0 else []
        with torch.inference_mode(), voice.context(), _plain(voice.model, voice.tokenizer, stops, generation):
            out = voice.model.generate(
                input_ids=ids.to(voice.device),
                attention_mask=mask.to(voice.device),
                logits_processor=noise,
                use_cache=True,
            )
        return [_read(voice.tokenizer, row, stops) for row in out[:, ids.shape[1] :].tolist()]

    what = f"{voice.label}: answering"
    return batches.over([len(question.ids) for question in questions], work, what, told, voice.device)


def _padded(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, ``[batch, longest]``, padded on the left."""
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    ids = torch.tensor([[pad] * gap + row for row, gap in zip(rows, gaps, strict=True)])
    return ids, torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])


@contextlib.contextmanager
def _plain(model: Any, tokenizer: Any, stops: list[int], generation: Generation) -> Iterator[None]:
    """No wishes of the checkpoint's own, such as a repetition penalty: base and tuned model answer by one rule."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = [(one, one.generation_config) for one in (model, base)]
    for one, _ in before:
        one.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=generation.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    try:
        yield
    finally:
        for one, config in before:
            one.generation_config = config


def _read(tokenizer: Any, ids: list[int], stops: list[int]) -> Answer:
    end = next((index for index, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[:end]
    text = str(tokenizer.decode(kept, skip_special_tokens=True)).strip()
    return Answer(text, len(kept), end is None)


class _Gumbel:
    """Turns the likeliest word into a draw from all of them: a logits processor of transformers."""

    def __init__(self, generation: Generation, rows: list[int]) -> None:
        self.temperature = generation.temperature
        self.own = [np.random.Generator(np.random.PCG64([generation.seed, row])) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``[batch, words]``, to be followed by argmax."""
        noise = torch.from_numpy(np.stack([own.gumbel(size=scores.shape[1]) for own in self.own]))
        return scores.float() / self.temperature + noise.to(scores.device, torch.float32)
