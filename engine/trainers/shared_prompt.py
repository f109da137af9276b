"""The prompt of a pair computed once for both of its answers.

A batch of pairs holds every prompt twice: before the better and before the worse answer. Here the backbone of a model
gets one row per pair instead, ``prompt, better answer, worse answer``, in which the worse answer neither sees the
better one nor counts its positions after it, and gives back the hidden states of the two rows that were asked for
(Wang & Hegde 2024, arXiv:2410.20305, whose mask this is). Around the backbone nothing changes: the output head, the
losses, adapters and the reference see batches as ever. What is saved is the share of the prompts in all tokens, halved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...planner.errors import first_line

#: Attention that takes a mask of its own making.
_MASKED = frozenset({"sdpa", "eager"})
#: Settings of a config that end what a token sees so many tokens before it.
_WINDOWS = ("sliding_window", "attention_chunk_size")
#: How much nearer to rows of their own the shared row has to be than one in which the answers see each other.
_NEARER = 0.3


@dataclass(frozen=True)
class Shares:
    """The tokens of each pair of a batch; ``multiple_of`` rounds up the length of the shared rows."""

    prompts: tuple[int, ...]
    better: tuple[int, ...]
    worse: tuple[int, ...]
    multiple_of: int = 1

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], multiple_of: int) -> Shares:
        """Of tokenised rows as a trainer of pairs has them."""

        def lengths(name: str) -> tuple[int, ...]:
            return tuple(len(row[name]) for row in rows)

        return cls(lengths("prompt_ids"), lengths("chosen_ids"), lengths("rejected_ids"), multiple_of)

    @property
    def width(self) -> int:
        """Tokens of a shared row."""
        longest = max(map(sum, zip(self.prompts, self.better, self.worse, strict=True)))
        return -(-longest // self.multiple_of) * self.multiple_of


@dataclass(frozen=True)
class Layout:
    """Indices between ``[2 pairs, length]`` and ``[pairs, width]``, both end to end.

    ``take`` says which token of the pairs' own rows each token of the shared rows is, ``back`` the other way;
    ``positions`` and ``mask`` (``[pairs, 1, width, width]``, True where a token may look) are those of the shared rows.
    """

    take: Tensor
    back: Tensor
    positions: Tensor
    mask: Tensor

    @classmethod
    def of(cls, shares: Shares, length: int, device: torch.device) -> Layout:
        """Made on the device; only the lengths are sent there."""
        pairs, width = len(shares.prompts), shares.width
        counts = torch.tensor([shares.prompts, shares.better, shares.worse])
        if device.type == "cuda":
            counts = counts.pin_memory()
        prompt, better, worse = counts.to(device, non_blocking=True).unsqueeze(-1)
        number = torch.arange(pairs, device=device).unsqueeze(-1)

        j = torch.arange(width, device=device).unsqueeze(0)
        second = prompt + better
        in_worse = (j >= second) & (j < second + worse)
        positions = torch.where(in_worse, j - better, torch.where(j < second, j, 0))
        take = torch.where(in_worse, number + pairs, number) * length + positions

        i = torch.arange(length, device=device).unsqueeze(0)
        first = number * width
        back = torch.cat([
            first + torch.where(i < second, i, 0),
            first + torch.where(i < prompt, i, torch.where(i < prompt + worse, i + better, 0)),
        ])  # fmt: skip

        in_better = (j >= prompt) & (j < second)
        apart = (j >= second).unsqueeze(-1) & in_better.unsqueeze(1)
        mask = (torch.ones(width, width, dtype=torch.bool, device=device).tril() & ~apart).unsqueeze(1)
        return cls(take, back, positions, mask)


def saved(rows: Any) -> float:
    """The share of all tokens of tokenised rows that is not computed when prompts are shared."""
    import pyarrow.compute as pc

    prompts, better, worse = (
        pc.sum(pc.list_value_length(rows.data.column(name))).as_py() or 0
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return float(prompts / max(2 * prompts + better + worse, 1))


def share_prompts(model: Any, longest: int, context: contextlib.AbstractContextManager[Any]) -> str:
    """Let ``model(…, shares=Shares)`` compute each prompt once; or say why it can't.

    Calls without ``shares`` go where they went before.

    Args:
        model: a causal model, with or without adapters.
        longest: tokens of the longest prompt with its answer.
        context: in which the model computes, for a trial.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = causal.config.get_text_config()
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its adapter puts virtual tokens before the prompt"
    if config._attn_implementation not in _MASKED:
        return f"its attention ({config._attn_implementation}) takes no mask"
    for name in _WINDOWS:
        window = getattr(config, name, None)
        if window is not None and window < longest:
            return f"its attention sees {window} tokens, and sequences have up to {longest}"
    backbone = causal.base_model
    if backbone is causal:
        return "the model has no backbone of its own"
    stock = backbone.forward

    def forward(*args: Any, shares: Shares | None = None, **kwargs: Any) -> Any:
        if shares is None:
            return stock(*args, **kwargs)
        ids: Tensor = kwargs.pop("input_ids") if "input_ids" in kwargs else args[0]
        kwargs.pop("attention_mask", None)
        return _shared(stock, config, ids, Layout.of(shares, ids.shape[1], ids.device), kwargs)

    with context:
        why = _disagreement(stock, config, backbone)
    if not why:
        backbone.forward = forward
    return why


def _shared(stock: Any, config: Any, ids: Tensor, layout: Layout, rest: dict[str, Any]) -> Any:
    """The backbone over shared rows; its last hidden states are those of the rows that were asked for."""
    mask: Tensor = layout.mask
    if config._attn_implementation == "eager":
        dtype = torch.get_autocast_dtype(ids.device.type) if torch.is_autocast_enabled(ids.device.type) else None
        dtype = dtype or config.dtype or torch.float32
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    out = stock(
        input_ids=ids.flatten()[layout.take],
        position_ids=layout.positions,
        attention_mask=mask,
        **{**rest, "use_cache": False},
    )
    # Each token of a prompt is in two rows, and a sum of two gradients is the same in either order.
    hidden = out.last_hidden_state.flatten(0, 1)
    out.last_hidden_state = hidden.index_select(0, layout.back.flatten()).unflatten(0, layout.back.shape)
    return out


@torch.no_grad()
def _disagreement(stock: Any, config: Any, backbone: Any) -> str:
    """Whether this very model gives the same with shared prompts, on two small pairs of unequal lengths.

    The yardstick is what comes out when the answers see each other: rounding is far below it in every format.
    """
    shares = Shares((3, 2), (3, 2), (2, 4))
    rows = [range(2, 8), range(12, 16), (*range(2, 5), 8, 9), (*range(12, 14), *range(16, 20))]
    ids, real = torch.zeros(4, 6, dtype=torch.long), torch.zeros(4, 6, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(list(row))
        real[number, : len(row)] = True
    device = next(backbone.parameters()).device
    ids, real = ids.to(device) % config.vocab_size, real.to(device)
    layout = Layout.of(shares, 6, device)
    leaky = replace(layout, mask=torch.ones_like(layout.mask).tril())
    training = backbone.training
    backbone.eval()
    try:
        alone = stock(input_ids=ids, use_cache=False).last_hidden_state[real].float()
        apart, mixed = (_shared(stock, config, ids, made, {}).last_hidden_state[real] for made in (layout, leaky))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"this model takes no mask and positions of ours ({first_line(error)})"
    finally:
        backbone.train(training)
    distance, leak = (apart - alone).norm(), (mixed - alone).norm()
    return "" if distance < _NEARER * leak else f"this model's hidden states are not the same ({distance:.1e} apart)"
