"""How likely a model finds each row: loss, tokens and hits, row by row.

The loss of a token is -log softmax(z)_y in fp32, as in training. Only positions with a label go through the output
head, so many at a time: the logits of a batch are never in memory at once. Models whose head is more than one matrix,
or whose adapter acts on more than their layers, are called as a whole instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.packing import Collator
from ..evaluate import IGNORED
from ..trainers.head import _logit_shape
from .batches import Batches, Told
from .voices import Voice

#: Positions that go through the output head at a time: 311 MB of fp32 logits at 151,936 words.
_POSITIONS = 512


@dataclass(frozen=True)
class Learned:
    """A row with labels (-100: none), and the bytes of text that its labelled tokens stand for."""

    input_ids: list[int]
    labels: list[int]
    bytes: int = 0


@dataclass(frozen=True)
class RowLoss:
    """Summed loss of a row in nats, over ``tokens`` labelled tokens, of which ``right`` have the largest logit."""

    loss: float
    tokens: int
    right: int


@dataclass(frozen=True)
class Head:
    """A model's backbone and output head, where its logits are ``cap(scale · head(hidden))`` and nothing more."""

    backbone: Any
    project: Any
    scale: float
    cap: float | None

    @classmethod
    def of(cls, voice: Voice) -> Head | None:
        """The head of a model, proven on a few words; None where the model has to be called as a whole."""
        model = voice.model
        config = next(iter(getattr(model, "peft_config", {}).values()), None)
        if config is not None and (config.is_prompt_learning or "XLORA" in str(config.peft_type)):
            return None
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = causal.get_output_embeddings()
        if head is None or not hasattr(causal, "base_model") or causal.base_model is causal:
            return None
        made = cls(causal.base_model, head, *_logit_shape(causal.config.get_text_config()))
        return made if made.agrees_with(voice) else None

    def agrees_with(self, voice: Voice) -> bool:
        """Whether logits as they are made here are those that the model makes, on a few words."""
        words = torch.arange(4, device=voice.device).unsqueeze(0)
        with torch.inference_mode(), voice.context():
            theirs = voice.model(input_ids=words, use_cache=False).logits.float()
            hidden = self.backbone(input_ids=words, use_cache=False).last_hidden_state
            ours = self.logits(hidden)
        if ours.shape != theirs.shape:
            return False
        return float((ours - theirs).norm()) <= 4 * torch.finfo(hidden.dtype).eps * float(theirs.norm())

    def logits(self, hidden: Tensor) -> Tensor:
        """``[positions, words]`` in fp32."""
        logits: Tensor = self.project(hidden).float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def row_losses(voice: Voice, rows: Sequence[Learned], batches: Batches, what: str, told: Told) -> list[RowLoss]:
    """Score rows; the same to rounding whatever the batch: rows are padded on the right, where nothing looks.

    Raises:
        HardwareError: memory runs out with a single row.
    """
    head, collate = Head.of(voice), Collator(voice.tokenizer.pad_token_id)

    def work(chosen: list[int]) -> list[RowLoss]:
        batch = collate([{"input_ids": rows[i].input_ids, "labels": rows[i].labels} for i in chosen])
        with torch.inference_mode(), voice.context():
            return _scored(voice.model, head, {name: t.to(voice.device) for name, t in batch.items()})

    return batches.over([len(row.input_ids) for row in rows], work, what, told, voice.device)


def _scored(model: Any, head: Head | None, batch: dict[str, Tensor]) -> list[RowLoss]:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    if head is None:
        made = model(**inputs, use_cache=False).logits
    else:
        made = head.backbone(**inputs, use_cache=False).last_hidden_state
    # Of a learned prompt, positions before the words don't count.
    states = made[:, -batch["labels"].shape[1] :][:, :-1][counted]
    words = targets[counted]
    losses, right = torch.zeros(len(words), device=words.device), torch.zeros_like(words)
    for start in range(0, len(words), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        logits = states[part].float() if head is None else head.logits(states[part])
        losses[part] = cross_entropy(logits, words[part], reduction="none")
        right[part] = (logits.argmax(-1) == words[part]).to(right.dtype)
    row = counted.nonzero()[:, 0]
    sums = torch.zeros(3, len(targets), dtype=torch.float64, device="cpu")
    for index, values in enumerate((losses, torch.ones_like(words), right)):
        sums[index].index_add_(0, row.cpu(), values.double().cpu())
    return [RowLoss(loss, int(tokens), int(hits)) for loss, tokens, hits in sums.T.tolist()]
