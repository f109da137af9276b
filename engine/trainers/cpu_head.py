"""TRL's output head of per-token log-probabilities, for the CPU with a TRL whose own needs Triton (before 1.16).

From 1.16 on TRL folds its tiles in torch where there is no GPU; 1.15 fails there. The logits of labelled positions are
made at once here: on a CPU models are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from ...planner.errors import HardwareError
from .head import _logit_shape


@dataclass
class WordScores(ModelOutput):
    """What TRL's head gives, ``[batch, length - 1]`` each: 0 where there is no label."""

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def needed(device: torch.device) -> bool:
    """Whether this TRL's own head fails on that device."""
    from trl.kernels import chunked_logprob

    return device.type == "cpu" and not hasattr(chunked_logprob, "_use_triton")


def give_word_scores(model: Any, temperature: float = 1.0) -> None:
    """Answer ``model(…, labels=…, fused_lm_head=True)`` without Triton; all other calls go where they went before."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    scale, cap = _logit_shape(causal.config.get_text_config())
    stock = causal.forward

    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return stock(*args, **(kwargs if labels is None else {**kwargs, "labels": labels}))
        if kwargs.get("output_router_logits"):
            do = "Install trl 1.16 or later, or train on a GPU."
            raise HardwareError("a mixture of experts can't be trained so on the CPU with this TRL", do=do)
        hidden = causal.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != -100
        logits = causal.get_output_embeddings()(hidden[mask]).float() * scale
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        logits = logits / temperature
        words, log_probs = targets[mask], logits.log_softmax(-1)

        def placed(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return WordScores(
            log_probs=placed(log_probs.gather(-1, words[:, None])[:, 0]),
            entropy=placed(-(log_probs.exp() * log_probs).sum(-1)),
            mean_logits=placed(logits.detach().mean(-1)),
            is_top1=placed(logits.argmax(-1) == words),
            label_mask=mask,
        )

    causal.forward = forward
