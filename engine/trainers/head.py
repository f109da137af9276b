"""The loss of a causal model from its last hidden states, over labelled positions alone.

The output projection and the cross-entropy are one operation (``kernels/linear_cross_entropy.py``): the logits of the
whole batch are never in memory, positions without a label are never projected, and the gradient of the hidden states
is made in the forward pass. A model is given a second way to be called, so that wrappers around it (adapters,
autocast, data parallelism) act as ever; a head that is more than one matrix keeps the trainer's own loss.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import ModelOutput

from ...kernels.token_weights import Weighting

#: Ways of attention that are compiled already.
_READY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

#: Share of labelled positions up to which it pays to leave the others out: gathering rows takes time too.
_FEW = 0.9


@dataclass
class TokenLoss(ModelOutput):
    """``loss``: sum over labelled positions divided by ``num_items``; ``right``: how many have the largest logit."""

    loss: torch.Tensor | None = None
    right: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """What a call asks for.

    Args:
        num_items: what the summed loss is divided by, on the device.
        labelled: positions with a label in this batch, known on the host.
        alone: the last layer may leave out the others: it is one of ours (``kernels/decoder_layer.py``).
        weighting: how much each of them counts.
    """

    num_items: torch.Tensor
    labelled: int
    alone: bool = False
    weighting: Weighting = "nll"


def give_token_loss(model: Any, context: contextlib.AbstractContextManager[Any]) -> str:
    """Let ``model(…, labels=…, token_loss=Wanted(…))`` answer with a :class:`TokenLoss`; or say why it can't.

    All other calls go where they went before.

    Args:
        context: in which the model computes, for a trial.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, scale, cap = causal.get_output_embeddings(), *_logit_shape(causal.config.get_text_config())
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return f"the output head is {type(head).__name__}, not one plain matrix"
    if head._forward_hooks or head._forward_pre_hooks:
        return "something listens to the output head"
    if not hasattr(causal, "base_model") or causal.base_model is causal:
        return "the model has no backbone of its own"
    # Of a model in shards the root alone gathers what is no layer's.
    called = model if hasattr(model, "unshard") else causal
    with context:
        why = _disagreement(causal, scale, cap, called)
    if why:
        return why
    stock = causal.forward

    def forward(*args: Any, token_loss: Wanted | None = None, **kwargs: Any) -> Any:
        if token_loss is None:
            return stock(*args, **kwargs)
        from ...kernels.decoder_layer import Needed
        from ...kernels.linear_cross_entropy import labelled_rows, scored, shift_labels

        labels = shift_labels(kwargs.pop("labels"))
        if token_loss.alone and 0 < token_loss.labelled <= _FEW * labels.numel():
            kwargs["needed"] = Needed(labelled_rows(labels, token_loss.labelled))
        out = causal.base_model(*args, **(kwargs | {"use_cache": False}))
        weight = causal.get_output_embeddings().weight
        loss, right = scored(
            out.last_hidden_state,
            weight,
            labels,
            num_items=token_loss.num_items,
            labelled=token_loss.labelled,
            softcap=cap,
            logit_scale=scale,
            weighting=token_loss.weighting,
        )
        return TokenLoss(loss=loss, right=right)

    causal.forward = forward
    return ""


def _logit_shape(config: Any) -> tuple[float, float | None]:
    """What the architecture does to its logits: a factor, and a soft cap after it."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        if scaling is not None:
            scale = float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
    return scale, getattr(config, "final_logit_softcapping", None)


def _disagreement(causal: Any, scale: float, cap: float | None, called: Any = None) -> str:
    """Whether logits as we make them are those that the model makes, on a few words.

    Args:
        called: the model, or what is around it.
    """
    device = causal.get_output_embeddings().weight.device
    words = torch.arange(4, device=device).unsqueeze(0)
    training, made = causal.training, list[Any]()
    causal.eval()
    listening = causal.base_model.register_forward_hook(lambda _module, _inputs, out: made.append(out[0]))
    try:
        # Once: a start waits for it. And without cuDNN, which takes a second to prepare attention for a shape that
        # never comes again; how hidden states are made does not matter for what the head makes of them.
        with torch.no_grad(), sdpa_kernel(_READY):
            theirs = (called or causal)(input_ids=words, use_cache=False).logits.float()
            if len(made) != 1:
                return "it does not call its backbone once"
            hidden = made[0]
            ours = causal.get_output_embeddings()(hidden).float() * scale
            if cap is not None:
                ours = cap * torch.tanh(ours / cap)
    finally:
        listening.remove()
        causal.train(training)
    distance = ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()
    limit = 4 * torch.finfo(hidden.dtype).eps
    return "" if distance < limit else f"its logits are not scale and cap of one product ({distance:.1e} apart)"
