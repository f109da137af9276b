"""Rotary position embedding of queries and keys in one launch.

    y_a = x_a · cos_a − x_b · sin_a          a, b: the two halves of a head (``half``, Llama), or its even and odd
    y_b = x_b · cos_b + x_a · sin_b          places (``interleaved``, GPT-J, Cohere)

    dx_a = dy_a · cos_a + dy_b · sin_b       the transposed map: the rotation by the negative angle, and right also
    dx_b = dy_b · cos_b − dy_a · sin_a       where the tables are scaled (YaRN) or differ between the halves

Source: Su et al., "RoFormer", arXiv 2104.09864. If the tables are narrower than a head, the rest of the head passes
through (partial rotary). Inputs and gradients may have any strides, 0 included; nothing is saved but the tables.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import launch, next_power_of_2

#: Which places of a head are a pair, and where their angles stand in the tables. ``half``: (i, i + R/2) in both;
#: ``interleaved``: (2i, 2i + 1) in both; ``interleaved-shared``: (2i, 2i + 1), whose one angle stands at i (GLM).
Layout = Literal["half", "interleaved", "interleaved-shared"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@triton.jit
def _load_pairs(row_ptr, dim, inside, pairs, STEP: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr):
    """Both members of each pair, ``[COUNT, PAIRS]`` in fp32.

    Pairs of neighbours are read as they lie, in whole vectors, and taken apart in registers.
    """
    if STEP == 2:
        place = tl.arange(0, 2 * PAIRS)
        both = tl.load(row_ptr + place[None, :] * dim, mask=inside & (place < 2 * pairs)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(both.to(tl.float32), [COUNT, PAIRS, 2]))
    else:
        pair = tl.arange(0, PAIRS)
        known = inside & (pair < pairs)[None, :]
        a = tl.load(row_ptr + pair[None, :] * dim, mask=known, other=0.0).to(tl.float32)
        b = tl.load(row_ptr + (pair + pairs)[None, :] * dim, mask=known, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _rotate(
    x_ptr, y_ptr, x_base, y_base, x_head, y_head, x_dim, y_dim, heads,
    cos_a, sin_a, cos_b, sin_b, pairs, rest, is_rest,
    STEP: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """All heads of one token; every load stands before every store."""
    head = tl.arange(0, HEADS)[:, None]
    x_row = x_ptr + x_base + head.to(tl.int64) * x_head
    y_row = y_ptr + y_base + head.to(tl.int64) * y_head
    a, b = _load_pairs(x_row, x_dim, head < heads, pairs, STEP, HEADS, PAIRS)
    if BACKWARD:
        new_a = a * cos_a + b * sin_b
        new_b = b * cos_b - a * sin_a
    else:
        new_a = a * cos_a - b * sin_a
        new_b = b * cos_b + a * sin_b
    new_a, new_b = new_a.to(y_ptr.dtype.element_ty), new_b.to(y_ptr.dtype.element_ty)
    if STEP == 2:
        place = tl.arange(0, 2 * PAIRS)[None, :]
        tl.store(y_row + place * y_dim, tl.interleave(new_a, new_b), mask=(head < heads) & (place < 2 * pairs))
    else:
        place = tl.arange(0, PAIRS)[None, :]
        inside = (head < heads) & (place < pairs)
        tl.store(y_row + place * y_dim, new_a, mask=inside)
        tl.store(y_row + (place + pairs) * y_dim, new_b, mask=inside)
    if PARTIAL:
        passing = (head < heads) & is_rest[None, :]
        value = tl.load(x_row + rest[None, :] * x_dim, mask=passing, other=0.0)
        tl.store(y_row + rest[None, :] * y_dim, value, mask=passing)


@triton.jit(do_not_specialize=["length"])
def _kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, length, q_heads, k_heads, dim, pairs,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim,
    qo_batch, qo_head, qo_token, qo_dim, ko_batch, ko_head, ko_token, ko_dim,
    cos_batch, cos_token, cos_dim, sin_batch, sin_token, sin_dim,
    STEP: tl.constexpr, TABLE_SHARED: tl.constexpr, PARTIAL: tl.constexpr,
    BACKWARD: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // length, program % length
    cos_row = cos_ptr + batch * cos_batch + token * cos_token
    sin_row = sin_ptr + batch * sin_batch + token * sin_token
    if TABLE_SHARED:
        pair = tl.arange(0, PAIRS)[None, :]
        cos_a = tl.load(cos_row + pair * cos_dim, mask=pair < pairs, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_row + pair * sin_dim, mask=pair < pairs, other=0.0).to(tl.float32)
        cos_b, sin_b = cos_a, sin_a
    else:
        one = tl.full([1, 1], 1, tl.int1)
        cos_a, cos_b = _load_pairs(cos_row, cos_dim, one, pairs, STEP, 1, PAIRS)
        sin_a, sin_b = _load_pairs(sin_row, sin_dim, one, pairs, STEP, 1, PAIRS)
    rest = 2 * pairs + tl.arange(0, REST)
    _rotate(
        q_ptr, q_out_ptr, batch * q_batch + token * q_token, batch * qo_batch + token * qo_token,
        q_head, qo_head, q_dim, qo_dim, q_heads, cos_a, sin_a, cos_b, sin_b, pairs,
        rest, rest < dim, STEP, BACKWARD, Q_HEADS, PAIRS, PARTIAL,
    )  # fmt: skip
    _rotate(
        k_ptr, k_out_ptr, batch * k_batch + token * k_token, batch * ko_batch + token * ko_token,
        k_head, ko_head, k_dim, ko_dim, k_heads, cos_a, sin_a, cos_b, sin_b, pairs,
        rest, rest < dim, STEP, BACKWARD, K_HEADS, PAIRS, PARTIAL,
    )  # fmt: skip


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: Layout, *, backward: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Without autograd: ``q``, ``k``: ``[batch, heads, tokens, dim]`` to new tensors in their memory order.

    Args:
        backward: apply the transposed map, which takes gradients of the results to those of ``q`` and ``k``.
        out: where to write, ``q`` and ``k`` themselves too: a program reads all of a pair before it writes.
    """
    q_out, k_out = out if out is not None else (torch.empty_like(q), torch.empty_like(k))
    batch, q_heads, length, dim = q.shape
    k_heads, rotary = k.shape[1], cos.shape[-1]
    if not q.numel() or not k.numel():
        return q_out, k_out
    shape = batch, length, rotary
    q_block, pairs_block = next_power_of_2(q_heads), next_power_of_2(rotary // 2)
    launch(
        _kernel, (batch * length,), (q, k, q_out, k_out, cos, sin),
        (
            length, q_heads, k_heads, dim, rotary // 2,
            *q.stride(), *k.stride(), *q_out.stride(), *k_out.stride(), *_steps(cos, shape), *_steps(sin, shape),
        ),
        (
            1 if layout == "half" else 2, layout == "interleaved-shared", rotary < dim, backward,
            q_block, next_power_of_2(k_heads), pairs_block, next_power_of_2(max(1, dim - rotary)),
        ),
        num_warps=min(16, max(2, q_block * pairs_block // 512)),
    )  # fmt: skip
    return q_out, k_out


def _steps(table: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a table as if it were expanded to ``[batch, tokens, rotary]``."""
    if any(mine not in (1, size) for mine, size in zip(table.shape, shape, strict=True)):
        raise ValueError(f"a table of shape {tuple(table.shape)} does not fit {shape}")
    return tuple([0 if mine == 1 else step for mine, step in zip(table.shape, table.stride(), strict=True)])


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return rotate(q, k, cos, sin, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *rotate(dq, dk, cos, sin, ctx.layout, backward=True), None, None, None


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: Layout = "half",
    *,
    head_axis: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys.

    Args:
        q, k: ``[batch, heads, tokens, dim]``, or ``[batch, tokens, heads, dim]`` with ``head_axis=2``; each with its
            own number of heads.
        cos, sin: ``[batch or 1, tokens, rotary]``, rotary ≤ dim and even; they get no gradient.

    Raises:
        ValueError: shapes that don't belong together, or tables that want a gradient.
    """
    if head_axis == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    rotary = cos.shape[-1]
    if q.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or q.dtype != k.dtype:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not belong together")
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[1] != q.shape[2] or cos.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"tables of shape {tuple(cos.shape)} do not fit q {tuple(q.shape)}")
    if rotary % 2 or rotary > q.shape[-1]:
        raise ValueError(f"{rotary} rotary places in heads of {q.shape[-1]}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("the tables of a rotary embedding get no gradient here")
    q, k = _RoPE.apply(q, k, cos, sin, layout)
    return (q.transpose(1, 2), k.transpose(1, 2)) if head_axis == 2 else (q, k)


def rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: Layout = "half",
    *,
    head_axis: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, as models write it; float64 in gives float64 arithmetic."""
    rotary = cos.shape[-1]
    if layout == "interleaved-shared":
        cos, sin = (table[..., : rotary // 2].repeat_interleave(2, dim=-1) for table in (cos, sin))
    cos, sin = cos.unsqueeze(head_axis), sin.unsqueeze(head_axis)

    def turned(x: torch.Tensor) -> torch.Tensor:
        if layout == "half":
            a, b = x.chunk(2, dim=-1)
            return torch.cat((-b, a), dim=-1)
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        front, rest = x[..., :rotary], x[..., rotary:]
        return torch.cat(((front * cos + turned(front) * sin).to(x.dtype), rest), dim=-1)

    return rotated(q), rotated(k)
