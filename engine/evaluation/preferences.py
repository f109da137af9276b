"""Whether a model prefers the better answers.

A policy's reward of an answer y to x is the one that it implies under DPO (Rafailov et al. 2023, arXiv:2305.18290),
beta (log p(y|x) - log p_ref(y|x)), where the reference is the base that the policy began as. A reward model scores each
answer by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .batches import Batches, Told
from .likelihood import Learned, RowLoss
from .rows import Compared
from .statistics import PerRow
from .voices import Voice


def answers_of(rows: Sequence[Compared]) -> list[Learned]:
    """The answers of all rows, one after the other."""
    return [answer for row in rows for answer in row.answers]


def likelier(rows: Sequence[Compared], losses: Sequence[RowLoss]) -> PerRow | None:
    """The share of pairs whose better answer is likelier per token; None where answers were judged one by one."""
    if any(len(row.answers) < 2 for row in rows):
        return None
    means = [one.loss / max(one.tokens, 1) for one in losses]
    return PerRow.of([float(means[2 * i] < means[2 * i + 1]) for i in range(len(rows))])


def implied_rewards(losses: Sequence[RowLoss], reference: Sequence[RowLoss], beta: float) -> list[float]:
    """The reward of each answer under DPO."""
    return [beta * (theirs.loss - ours.loss) for ours, theirs in zip(losses, reference, strict=True)]


def rewarded(rows: Sequence[Compared], rewards: Sequence[float]) -> dict[str, PerRow]:
    """By how much better answers have more reward than worse ones (``reward_margin``), and in how many rows they do
    (``reward_accuracy``). An answer judged by itself is held against a reward of 0: what the reference gives it."""
    margins, start = [], 0
    for row in rows:
        mine = rewards[start : start + len(row.answers)]
        start += len(row.answers)
        margins.append(sum(reward if good else -reward for reward, good in zip(mine, row.good, strict=True)))
    return {
        "reward_accuracy": PerRow.of([float(margin > 0) for margin in margins]),
        "reward_margin": PerRow.of(margins),
    }


def scored(voice: Voice, answers: Sequence[Learned], batches: Batches, told: Told) -> list[float]:
    """What a reward model gives each answer: the score at its last token.

    Raises:
        HardwareError: memory runs out with a single row.
    """
    pad = voice.tokenizer.pad_token_id
    voice.model.config.get_text_config().pad_token_id = pad  # by which transformers finds the last token of a row

    def work(chosen: list[int]) -> list[float]:
        rows = [answers[i].input_ids for i in chosen]
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=voice.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=voice.device)
        with torch.inference_mode(), voice.context():
            made: Any = voice.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [float(score) for score in made[:, 0].float().tolist()]

    return batches.over([len(row.input_ids) for row in answers], work, f"{voice.label}: scoring", told, voice.device)
