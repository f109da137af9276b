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
def _load_pairs(row_ptr, dim, inside, pairs, STEP: tl.constexpr, PAIRS: tl.constexpr):
    """Both members of each pair, ``[rows, PAIRS]`` each; of neighbours all as they lie, in whole vectors, twice."""
    if STEP == 2:
        place = tl.arange(0, 2 * PAIRS)
        a = tl.load(row_ptr + place[None, :] * dim, mask=inside & (place < 2 * pairs)[None, :], other=0.0)
        b = a
    else:
        pair = tl.arange(0, PAIRS)
        known = inside & (pair < pairs)[None, :]
        a = tl.load(row_ptr + pair[None, :] * dim, mask=known, other=0.0)
        b = tl.load(row_ptr + (pair + pairs)[None, :] * dim, mask=known, other=0.0)
    return a, b


@triton.jit
def _apart(a, b, STEP: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """What was loaded as pairs in fp32, ``[ROWS, PAIRS]``; neighbours are taken apart in registers."""
    if STEP == 2:
        a, b = tl.split(tl.reshape(a.to(tl.float32), [ROWS, PAIRS, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_rotated(
    row_ptr, dim, inside, pairs, a, b, cos_a, sin_a, cos_b, sin_b,
    STEP: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    a, b = _apart(a, b, STEP, ROWS, PAIRS)
    if BACKWARD:
        new_a = a * cos_a + b * sin_b
        new_b = b * cos_b - a * sin_a
    else:
        new_a = a * cos_a - b * sin_a
        new_b = b * cos_b + a * sin_b
    new_a, new_b = new_a.to(row_ptr.dtype.element_ty), new_b.to(row_ptr.dtype.element_ty)
    if STEP == 2:
        place = tl.arange(0, 2 * PAIRS)[None, :]
        tl.store(row_ptr + place * dim, tl.interleave(new_a, new_b), mask=inside & (place < 2 * pairs))
    else:
        place = tl.arange(0, PAIRS)[None, :]
        known = inside & (place < pairs)
        tl.store(row_ptr + place * dim, new_a, mask=known)
        tl.store(row_ptr + (place + pairs) * dim, new_b, mask=known)


@triton.jit(do_not_specialize=["length"])
def _kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, length, q_heads, k_heads, dim, pairs,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim,
    qo_batch, qo_head, qo_token, qo_dim, ko_batch, ko_head, ko_token, ko_dim,
    cos_batch, cos_token, cos_dim, sin_batch, sin_token, sin_dim,
    STEP: tl.constexpr, TABLE_SHARED: tl.constexpr, PARTIAL: tl.constexpr,
    BACKWARD: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token. Every load stands before every store: results may lie where the inputs do, and a load
    behind a store waits for memory once more.
    """
    batch, token = (tl.program_id(0) // length).to(tl.int64), (tl.program_id(0) % length).to(tl.int64)
    q_rows, k_rows = tl.arange(0, Q_HEADS)[:, None], tl.arange(0, K_HEADS)[:, None]
    in_q, in_k = q_rows < q_heads, k_rows < k_heads
    q_row = q_ptr + batch * q_batch + token * q_token + q_rows.to(tl.int64) * q_head
    k_row = k_ptr + batch * k_batch + token * k_token + k_rows.to(tl.int64) * k_head
    q_out = q_out_ptr + batch * qo_batch + token * qo_token + q_rows.to(tl.int64) * qo_head
    k_out = k_out_ptr + batch * ko_batch + token * ko_token + k_rows.to(tl.int64) * ko_head
    cos_row = cos_ptr + batch * cos_batch + token * cos_token
    sin_row = sin_ptr + batch * sin_batch + token * sin_token
    one = tl.full([1, 1], 1, tl.int1)
    TABLE: tl.constexpr = 1 if TABLE_SHARED else STEP
    cos_a, cos_b = _load_pairs(cos_row, cos_dim, one, pairs, TABLE, PAIRS)
    sin_a, sin_b = _load_pairs(sin_row, sin_dim, one, pairs, TABLE, PAIRS)
    q_a, q_b = _load_pairs(q_row, q_dim, in_q, pairs, STEP, PAIRS)
    k_a, k_b = _load_pairs(k_row, k_dim, in_k, pairs, STEP, PAIRS)
    rest = 2 * pairs + tl.arange(0, REST)[None, :]
    if PARTIAL:
        q_rest = tl.load(q_row + rest * q_dim, mask=in_q & (rest < dim), other=0.0)
        k_rest = tl.load(k_row + rest * k_dim, mask=in_k & (rest < dim), other=0.0)
    if TABLE_SHARED:
        cos_b, sin_b = cos_a, sin_a
    cos_a, cos_b = _apart(cos_a, cos_b, TABLE, 1, PAIRS)
    sin_a, sin_b = _apart(sin_a, sin_b, TABLE, 1, PAIRS)
    _store_rotated(
        q_out, qo_dim, in_q, pairs, q_a, q_b, cos_a, sin_a, cos_b, sin_b, STEP, BACKWARD, Q_HEADS, PAIRS
    )  # fmt: skip
    _store_rotated(
        k_out, ko_dim, in_k, pairs, k_a, k_b, cos_a, sin_a, cos_b, sin_b, STEP, BACKWARD, K_HEADS, PAIRS
    )  # fmt: skip
    if PARTIAL:
        tl.store(q_out + rest * qo_dim, q_rest, mask=in_q & (rest < dim))
        tl.store(k_out + rest * ko_dim, k_rest, mask=in_k & (rest < dim))


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
