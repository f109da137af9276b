"""How much each labelled token counts for the loss, by what the model makes of it now; no gradient goes through it.

    nll   w = 1
    dft   w = p(label): what is unlikely counts less, so that one bad row can't dominate a step
    eaft  w = H / ln K: the entropy H of the K = 20 likeliest words, as probabilities among themselves; where the model
          is sure, right or wrong, it is left as it is

Sources: dynamic fine-tuning, Wu et al., arXiv 2508.05629; entropy-adaptive fine-tuning, Diao et al., arXiv 2601.02151.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math
from typing import Literal

import torch

Weighting = Literal["nll", "dft", "eaft"]
#: Words whose entropy eaft measures.
TOP = 20


def top_entropy(logits: torch.Tensor, scale: float = 1.0, cap: float | None = None) -> torch.Tensor:
    """Normalised entropy of the likeliest words, ``[rows]``, from 0 to 1.

    Args:
        logits: ``[rows, words]`` as the head's product gives them.
        scale: factor on them, above 0.
        cap: soft cap after that.
    """
    count = min(TOP, logits.shape[-1])
    top = logits.detach().topk(count, dim=-1, sorted=False).values
    top = (top if top.dtype == torch.float64 else top.float()) * scale
    if cap is not None:
        top = cap * torch.tanh(top / cap)
    logs = top.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1) / math.log(max(count, 2))


def token_weights(weighting: Weighting, logits: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """The weights of rows with known losses.

    Args:
        logits: ``[rows, words]``, scaled and capped.
        losses: ``[rows]``, the negative log-likelihood of each row's label.
    """
    if weighting == "dft":
        return losses.detach().neg().exp()
    return top_entropy(logits) if weighting == "eaft" else torch.ones_like(losses)
