"""Causal attention as a piece of a larger function: run now, differentiated later, with q, k and v dropped between.

The stock operation (``scaled_dot_product_attention``) picks the fastest kernel of the machine: cuDNN on Hopper, flash
attention elsewhere. It is run under autograd, so its own backward serves; hooks on what it saves keep q, k, v and the
output out of that graph, for the caller to keep, to move or to compute again.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Documents:
    """Where independent sequences lie in a batch whose rows hold several, padding being one of them.

    Args:
        lengths: tokens of each, row after row; they add up to the batch's tokens. A bound on the longest will do.
        starts: their running sum from 0, int32, on the device; it decides. Documents may be empty.
    """

    lengths: tuple[int, ...]
    starts: torch.Tensor

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def mask(self, batch: int, length: int, window: int | None = None) -> torch.Tensor:
        """The same as a mask, ``[batch, 1, length, length]``, True where a query may look."""
        place = torch.arange(batch * length, dtype=torch.int32, device=self.starts.device)
        document = torch.searchsorted(self.starts, place, right=True).view(batch, length)
        near = _near(length, window or length, self.starts.device)
        return (near & (document[:, :, None] == document[:, None, :])).unsqueeze(1)


@dataclass
class Attended:
    """One attention that was run. ``held`` is filled for the backward pass: q, k, v and the output."""

    output: Any
    inputs: list[Any]
    held: list[torch.Tensor]


class _Source(torch.autograd.Function):
    """Tensors with a gradient and nothing behind them: a leaf's own node would keep its memory."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, ...]:
        return (None,) * (len(_) + 1)


class _Saved:
    """What one hook was given: a tensor, or the place of one that the caller holds and the shape it was seen in."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.place, self.shape = -1, tensor.shape


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    documents: Documents | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, Attended]:
    """Attention of ``[batch, heads, tokens, dim]``; fewer key than query heads share them.

    Args:
        mask: as the stock operation takes it, True where a query may look; None is plain causal attention.
        scale: of the products of queries and keys.
        documents: causal attention within each of these, in place of ``mask``.
        window: within documents, how many positions a query sees, its own and those before; None if all. A mask says
            so itself.

    Returns:
        The output ``[batch, heads, tokens, dim]``, and what :func:`gradients` needs.
    """
    saved: list[_Saved] = []
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> _Saved:
        saved.append(_Saved(tensor))
        return saved[-1]

    def unpack(packed: _Saved) -> torch.Tensor:
        if packed.tensor is not None:
            return packed.tensor
        head = held[packed.place]
        return head if len(packed.shape) == head.dim() else _end_to_end(head)

    with torch.enable_grad():
        leaves = _Source.apply(_anchor(), q, k, v)
        queries, keys, values = leaves
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            if documents is not None:
                out = _within(documents, queries, keys, values, scale, window)
            else:
                out = _over_rows(queries, keys, values, mask, scale)
    heads = (q, k, v, out)
    memories = [_memory(head) for head in heads]
    for item in saved:
        assert item.tensor is not None
        mine = _memory(item.tensor)
        item.place = next(
            (
                place
                for place, (memory, head) in enumerate(zip(memories, heads, strict=True))
                if mine == memory and _is_view(item.tensor, head)
            ),
            -1,
        )
        if item.place >= 0:
            item.shape, item.tensor = item.tensor.shape, None
    edges = [torch.autograd.graph.get_gradient_edge(leaf) for leaf in leaves]
    return out.detach(), Attended(torch.autograd.graph.get_gradient_edge(out), edges, held)


def _over_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None:  # no fused kernel takes both a mask and shared heads
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    causal = mask is None and q.shape[2] > 1
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped and mask is None
    )


def takes_documents(x: torch.Tensor, head_dim: int) -> bool:
    """Whether attention within documents can run on heads made of ``x``; if not, a mask has to say the same."""
    return not x.is_cuda or (x.dtype in (torch.bfloat16, torch.float16) and head_dim <= 256 and head_dim % 8 == 0)


def _within(
    documents: Documents, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """All rows end to end: flash attention's own way of taking sequences of many lengths, shared heads included."""
    batch, heads, length, dim = q.shape
    q, k, v = (_end_to_end(t) for t in (q, k, v))
    if q.is_cuda:
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, documents.starts, documents.starts, documents.longest, documents.longest, 0.0, True, False,
            scale=scale, window_size_left=None if window is None else window - 1,
        )[0]  # fmt: skip
    else:
        lengths = [n for n in documents.starts.diff().tolist() if n]
        pieces = zip(*(t.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for t in (q, k, v)), strict=True)
        masks = [None if window is None else _near(n, window, q.device) for n in lengths]
        made = [_over_rows(a, b, c, mask, scale) for (a, b, c), mask in zip(pieces, masks, strict=True)]
        out = torch.cat(made, dim=2)[0].transpose(0, 1)
    return out.reshape(batch, length, heads, dim).transpose(1, 2)


def _near(length: int, window: int, device: torch.device) -> torch.Tensor:
    """``[length, length]``, True where a query sees a position: its own and those before it."""
    here = torch.arange(length, device=device)
    back = here[:, None] - here[None, :]
    return (back >= 0) & (back < window)


def gradients(
    attended: Attended, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, given again what :func:`attend` was given and what it returned. Once per attention."""
    attended.held[:] = (q, k, v, out)
    dq, dk, dv = torch.autograd.grad([attended.output], attended.inputs, [dout])
    attended.held.clear()
    return dq, dk, dv


def _end_to_end(heads: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, dim]`` as ``[batch · tokens, heads, dim]``."""
    return heads.transpose(1, 2).reshape(-1, heads.shape[1], heads.shape[3])


@functools.cache
def _anchor() -> torch.Tensor:
    """What makes a function's outputs part of a graph; it is given no gradient, so one serves all.

    A tensor of the CPU whoever asks first: followed on fake tensors, a step would leave a fake one to all after it.
    """
    with torch.utils._python_dispatch._disable_current_modes(), torch.inference_mode(False):
        return torch.zeros((), device="cpu", requires_grad=True)


def _memory(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """What views of the same values have in common."""
    return _address(tensor), tensor.numel(), tensor.dtype


def _is_view(tensor: torch.Tensor, head: torch.Tensor) -> bool:
    """Whether a tensor of a head's memory shows queries, keys, values or outputs as they are or end to end.

    A step along a dimension of one element is never taken, and what it would be differs from view to view.
    """
    if tensor.dim() == 3 and head.dim() == 4:
        head = _end_to_end(head)  # a copy, if it can't be a view; its memory is another then
    if tensor.shape != head.shape or _address(tensor) != _address(head):
        return False
    steps = zip(tensor.shape, tensor.stride(), head.stride(), strict=False)
    return all(size == 1 or mine == other for size, mine, other in steps)


def _address(tensor: torch.Tensor) -> Hashable:
    return tensor.data_ptr()
