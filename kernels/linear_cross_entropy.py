"""The output projection and the cross-entropy loss in one, without the logits of the whole batch in memory.

    z_v = c(a · h·W_v)        a: logit scale;  c(x) = k·tanh(x/k) if there is a soft cap k
    l   = w · (logsumexp(z) − z_label) + β · logsumexp(z)²    per labelled row; β: z-loss; w: :mod:`.token_weights`
    loss = Σ l / N            N: the number of labelled rows, or what the caller normalises by

    ∂l/∂z_v = p_v · (w + 2β·logsumexp(z)) − w · [v = label]   p = softmax(z)
    ∂l/∂(h·W_v) = a · c'(·) · ∂l/∂z_v,   c' = 1 − (z_v/k)²

Only rows with a label are computed. They go through the head in chunks: cuBLAS makes the logits of a chunk, one kernel
turns them into loss and gradient in place, cuBLAS makes the gradient of h (and of W if it is trained), and the buffer
is used again. So forward does three products where recomputation would need four, and backward only scales, where the
gradient of the loss is not 1. If W is trained and in bf16, the gradients of all logits wait for one product, as long as
they take no more memory than sums over chunks in fp32 would.

Sources: online normaliser, Milakov and Gimelshein, arXiv 1805.02867; z-loss, Chowdhery et al. (PaLM), arXiv
2204.02311; soft cap, Gemma 2, arXiv 2408.00118; chunking with the gradient in forward, Hsu et al. (Liger), arXiv
2410.10989. Chunks here are sized by rows, not by vocabulary / hidden size, so that W is streamed few times.

The gradient of h is summed in fp32, scaled in fp32 and rounded once; that of W is one product of fp32 sums, or summed
over chunks in fp32. Backward multiplies both by the gradient of the loss in place, which rounds again unless it is a
power of two; so it runs once per forward.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .launch import as_rows, cdiv, launch, next_power_of_2
from .token_weights import Weighting, token_weights, top_entropy
from .wide import add_mm_fp32, mm_fp32

#: Rows of one chunk: enough for the head's product to run at full speed, 263 MB of bf16 logits at 128,256 words.
CHUNK_ROWS = 1024
#: Of 28 ways to go through a row of 128,256 words on an H200 the fastest; it is read twice, from memory and from cache.
_BLOCK, _WARPS = 16384, 32
_LANE = 8  # values of a block that lie with one thread
#: Blocks that are read or worked on at a time: more than one lie in shared memory, and from 128 KiB of it on a
#: processor has one row under way, so that fewer wait in the cache for their second reading.
_STAGES = 1
_LAST_USE = "evict_first"  # of the cache, what a row is done with goes before what is read again
_WEIGHTINGS: dict[Weighting, int] = {"nll": 0, "dft": 1, "eaft": 2}


@triton.jit
def _tanh(x):
    """tanh through the sigmoid; by its series near 0, where the former cancels."""
    square = x * x
    series = x * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _logits(base, column, n_columns, scale, cap, CAPPED: tl.constexpr, EVICT: tl.constexpr):
    """Logits as they are stored, to the base 2 (times log2(e)), and the slope of the cap there."""
    read = tl.load(base + column, mask=column < n_columns, other=0.0, eviction_policy=EVICT).to(tl.float32)
    slope = 1.0
    if CAPPED:
        capped = _tanh(read * (scale / cap))
        z = capped * (cap * 1.4426950408889634)
        slope = 1.0 - capped * capped
    else:
        z = read * (scale * 1.4426950408889634)
    return z, slope


@triton.jit
def _rows_kernel(
    logits_ptr, label_ptr, loss_ptr, right_ptr, weight_ptr, stride, n_columns, scale, cap, z_weight,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTING: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
    STAGES: tl.constexpr, LAST_USE: tl.constexpr,
):  # fmt: skip
    """Loss of one row, and its gradient written over its logits. A row labelled -1 has neither.

    WEIGHTING: the row counts 0 once, 1 by the probability of its label, 2 as much as ``weight_ptr`` says.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    base = logits_ptr + row * stride
    column = tl.arange(0, BLOCK)
    if label == -1:
        tl.store(loss_ptr + row, 0.0)
        tl.store(right_ptr + row, 0)
        if GRADIENT:
            for start in range(0, n_columns, BLOCK):
                inside = start + column < n_columns
                tl.store(base + start + column, tl.zeros([BLOCK], logits_ptr.dtype.element_ty), mask=inside)
    else:
        known = (label >= 0) & (label < n_columns)
        target, slope_there = _logits(base, tl.where(known, label, n_columns), n_columns, scale, cap, CAPPED, "")
        # Each thread keeps the largest value and the sum of what it has seen; they meet once, behind the loop. Not
        # −∞: the difference of two such is no number.
        tops = tl.full([BLOCK // LANE], -1e30, tl.float32)
        totals = tl.zeros([BLOCK // LANE], tl.float32)
        for start in tl.range(0, n_columns, BLOCK, num_stages=STAGES):
            z, _ = _logits(base, start + column, n_columns, scale, cap, CAPPED, "")
            z = tl.reshape(tl.where(start + column < n_columns, z, float("-inf")), [BLOCK // LANE, LANE])
            new_tops = tl.maximum(tops, tl.max(z, axis=1))
            totals = totals * tl.exp2(tops - new_tops) + tl.sum(tl.exp2(z - new_tops[:, None]), axis=1)
            tops = new_tops
        top = tl.max(tops, axis=0)
        lse2 = top + tl.log2(tl.sum(totals * tl.exp2(tops - top), axis=0))
        lse = lse2 * 0.6931471805599453

        weight = 1.0
        if WEIGHTING == 1:
            weight = tl.exp2(target - lse2)
        if WEIGHTING == 2:
            weight = tl.load(weight_ptr + row)
        loss = weight * (lse - target * 0.6931471805599453) + z_weight * lse * lse
        # A label outside the vocabulary must not pass unseen, nor read foreign memory.
        tl.store(loss_ptr + row, tl.where(known, loss, float("nan")))
        tl.store(right_ptr + row, (known & (target >= top)).to(tl.int32))

        if GRADIENT:
            factor = (weight + 2.0 * z_weight * lse) * scale
            for step in tl.range(0, n_columns, BLOCK, num_stages=STAGES):
                start = (tl.cdiv(n_columns, BLOCK) - 1) * BLOCK - step  # what was read last is still in the cache
                at = start + column
                z, slope = _logits(base, at, n_columns, scale, cap, CAPPED, LAST_USE)
                dz = (tl.exp2(z - lse2) * factor * slope).to(logits_ptr.dtype.element_ty)
                # Rows that are still to be read again need the cache more.
                tl.store(base + at, dz, mask=at < n_columns, eviction_policy=LAST_USE)
            # The label's own value is put right afterwards: looked for on the way, it is two of five instructions.
            tl.debug_barrier()
            dz = (tl.exp2(target - lse2) * factor - weight * scale) * slope_there
            tl.store(base + label, dz.to(logits_ptr.dtype.element_ty), mask=known)


@triton.jit
def _place_kernel(source_ptr, row_ptr, scale_ptr, out_ptr, n_columns, out_stride, BLOCK: tl.constexpr):
    """out[row[i]] = scale · source[i], rounded once."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + i)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_columns
    value = tl.load(source_ptr + i * n_columns + column, mask=inside, other=0.0) * tl.load(scale_ptr)
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, n, BLOCK: tl.constexpr):
    """x · scale in place, of which nothing is read or written where the scale is 1."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32) * scale
        tl.store(x_ptr + at, value.to(x_ptr.dtype.element_ty), mask=at < n)


def shift_labels(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Labels moved so that position t holds the word after it; the last position has none. ``[..., sequence]``.

    With this the hidden states need no slicing, which would copy them.
    """
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *,
    num_items: int | torch.Tensor | None = None, labelled: int | None = None, ignore_index: int = -100,
    softcap: float | None = None, logit_scale: float = 1.0, z_loss: float = 0.0, weighting: Weighting = "nll",
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:  # fmt: skip
    """Cross-entropy of ``hidden @ weight.T`` against ``labels``; a scalar in fp32. Arguments as in :func:`scored`."""
    return scored(
        hidden, weight, labels, num_items=num_items, labelled=labelled, ignore_index=ignore_index, softcap=softcap,
        logit_scale=logit_scale, z_loss=z_loss, weighting=weighting, chunk_rows=chunk_rows,
    )[0]  # fmt: skip


def scored(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *,
    num_items: int | torch.Tensor | None = None, labelled: int | None = None, ignore_index: int = -100,
    softcap: float | None = None, logit_scale: float = 1.0, z_loss: float = 0.0, weighting: Weighting = "nll",
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss, a scalar in fp32, and how many labels have the largest logit of their row (ties count).

    Args:
        hidden: ``[..., features]`` in bf16, fp16 or fp32.
        weight: ``[vocabulary, features]``, of the same dtype or wider; its gradient is made if it is trained.
        labels: ``[...]`` integers, already shifted (:func:`shift_labels`). A label that is neither ``ignore_index``
            nor in the vocabulary makes the loss NaN.
        num_items: what the sum is divided by (``num_items_in_batch`` over accumulated batches and ranks); by default
            the number of labelled rows.
        labelled: the number of labelled rows, or a bound on it, if the caller knows it on the host. Without it the
            count is fetched, and the host waits for the GPU once. Too small a number makes the loss NaN.
        weighting: how much each labelled row counts; the sum is divided by their number all the same.

    A batch without a label gives loss 0 and zero gradients.

    Raises:
        ValueError: shapes that don't belong together.
    """
    if hidden.shape[-1] != weight.shape[-1] or labels.numel() * hidden.shape[-1] != hidden.numel():
        raise ValueError(f"shapes {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(labels.shape)} do not fit")
    if torch.compiler.is_compiling():  # torch 2.11 traces a gradient that is made in forward into zeros
        torch._dynamo.graph_break()
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    settings = (ignore_index, softcap, logit_scale, z_loss, weighting, chunk_rows, labelled, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, num_items, settings)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
        num_items: int | torch.Tensor | None, settings: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        ignore_index, softcap, logit_scale, z_loss, weighting, chunk_rows, labelled, gradient = settings
        h_grad, w_grad = (gradient and needed for needed in ctx.needs_input_grad[:2])
        h, w, flat = as_rows(hidden), weight.to(hidden.dtype), labels.reshape(-1)
        rows, targets, count = _select(flat, ignore_index, labelled)
        if isinstance(num_items, int | float):
            items = torch.full((), float(num_items), device=h.device)  # a copy from the host would wait for the GPU
        else:
            items = (count.clamp_min(1) if num_items is None else num_items).to(h.device, torch.float32)
        factor = 1.0 / items

        n, features, words = rows.numel(), h.shape[1], w.shape[0]
        losses = torch.zeros(n, dtype=torch.float32, device=h.device)
        right = torch.zeros(n, dtype=torch.int32, device=h.device)
        # One row more than there are: unused slots of a bound that was too large are written there.
        dh = torch.zeros(h.shape[0] + 1, features, dtype=h.dtype, device=h.device) if h_grad else None
        whole = w_grad and h.dtype == weight.dtype == torch.bfloat16
        wait = _rows_that_wait(n, features, chunk_rows) if whole else chunk_rows
        whole = whole and n <= wait
        dw = torch.zeros(words, features, dtype=torch.float32, device=h.device) if w_grad and not whole else None
        # Rows that start at multiples of 64 values let cuBLAS and the row kernel use wide loads and stores.
        pitch = -(-words // 64) * 64
        buffer = torch.empty(min(n, wait), pitch, dtype=h.dtype, device=h.device)[:, :words]
        for first in range(0, n, max(1, wait)):
            index = rows[first : first + wait]
            part = h.index_select(0, index.clamp_max(h.shape[0] - 1))
            for start in range(0, index.numel(), chunk_rows):
                logits, among = buffer[start : index.numel()][:chunk_rows], slice(first + start, None)
                mine = part[start : start + chunk_rows]
                torch.mm(mine, w.t(), out=logits)
                weights = top_entropy(logits, logit_scale, softcap) if weighting == "eaft" else losses
                figures = (targets[among], losses[among], right[among], weights)
                rows_of_loss(logits, figures, logit_scale, softcap, z_loss, weighting, gradient=h_grad or w_grad)
                if dh is not None:
                    _place(mm_fp32(logits, w), index[start : start + chunk_rows], factor, dh)
            if dw is not None:
                add_mm_fp32(dw, buffer[: index.numel()].t(), part)
        made = dw.mul_(factor).to(weight.dtype) if dw is not None else None
        if whole:
            # 1 / N goes into the small operand, whose rounding errors are many and small in each sum.
            made = torch.mm(buffer[:n].t(), (part.float() * factor).to(h.dtype)) if n else torch.zeros_like(w)
        del buffer
        ctx.shape = hidden.shape
        ctx.gradients = dh[:-1] if dh is not None else None, made
        # More labels than the caller said would be left out silently.
        found = right.sum()
        ctx.mark_non_differentiable(found)
        return torch.where(count <= n, losses.sum() * factor, torch.nan), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor, _right: Any = None) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss was asked for its gradient twice; what it kept is handed on")
        (dh, dw), ctx.gradients = ctx.gradients, None
        for gradient in (dh, dw):
            if gradient is not None and gradient.numel():
                n = gradient.numel()
                launch(_scale_kernel, (cdiv(n, 4096),), (gradient, dloss), (n,), (4096,), num_warps=8)
        return dh.view(ctx.shape) if dh is not None else None, dw, None, None, None


def rows_of_loss(
    logits: torch.Tensor, figures: tuple[torch.Tensor, ...], logit_scale: float, softcap: float | None, z_loss: float,
    weighting: Weighting, *, gradient: bool,
) -> None:  # fmt: skip
    """The loss of each row of ``logits`` ``[rows, words]``, which become its gradient if that is asked for.

    Args:
        figures: for each row its target, int64, -1 for none; then, to be filled, its loss in fp32 and whether no logit
            is above its target's, int32; then how much it counts, which only ``eaft`` looks at.
    """
    words = logits.shape[1]
    block = min(_BLOCK, max(_LANE, next_power_of_2(words)))
    launch(
        _rows_kernel, (logits.shape[0],), (logits, *figures),
        (logits.stride(0), words, float(logit_scale), float(softcap or 1.0), float(z_loss)),
        (softcap is not None, gradient, _WEIGHTINGS[weighting], block, _LANE, _STAGES, _LAST_USE),
        num_warps=max(1, min(_WARPS, block // (32 * _LANE))),
    )  # fmt: skip


def _rows_that_wait(n: int, features: int, chunk_rows: int) -> int:
    """Of how many rows the 16-bit gradients of the logits wait for the product that makes the weight's gradient.

    All of them, where they take no more memory than sums over chunks would: 4 bytes for each of the weight's values,
    besides one chunk and the rounded copy. One product then, rounded once. Else as many as take no more than that copy.
    """
    return n if n <= 2 * features + chunk_rows else max(chunk_rows, features)


def labelled_rows(labels: torch.Tensor, labelled: int, ignore_index: int = -100) -> torch.Tensor:
    """Which rows have a label, int64 ``[labelled]``; slots beyond their number name the row after the last one.

    Args:
        labels: ``[...]`` integers, already shifted.
        labelled: how many there are, or a bound on it.
    """
    return _select(labels.reshape(-1), ignore_index, labelled)[0]


def _select(
    labels: torch.Tensor, ignore_index: int, labelled: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows with a label, in order; their labels; how many there are (on the device).

    Slots beyond the number of labels name the row after the last one and have the label -1.
    """
    keep = labels != ignore_index
    count = keep.sum()
    n = int(count.item()) if labelled is None else min(labelled, labels.numel())
    # Each kept row knows its slot by a running count; all others share one slot past the end. nonzero() would make
    # the host wait for its size.
    slot = torch.where(keep, keep.cumsum(0) - 1, n).clamp_max(n)
    rows = torch.full((n + 1,), labels.numel(), dtype=torch.int64, device=labels.device)
    rows.scatter_(0, slot, torch.arange(labels.numel(), device=labels.device))
    rows = rows[:n]
    if not n:
        return rows, rows, count
    targets = labels.index_select(0, rows.clamp_max(labels.numel() - 1)).to(torch.int64)
    # -1 is the kernel's own word for "no label": a label that happens to be -1 is out of range like any other.
    targets = torch.where(targets == -1, -2, targets)
    return rows, torch.where(rows < labels.numel(), targets, -1), count


def _place(source: torch.Tensor, rows: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    columns = source.shape[1]
    block = min(2048, next_power_of_2(columns))
    grid, strides = (source.shape[0], cdiv(columns, block)), (columns, out.stride(0))
    launch(_place_kernel, grid, (source, rows, factor, out), strides, (block,), num_warps=4)


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *,
    num_items: int | torch.Tensor | None = None, ignore_index: int = -100,
    softcap: float | None = None, logit_scale: float = 1.0, z_loss: float = 0.0, weighting: Weighting = "nll",
) -> torch.Tensor:  # fmt: skip
    """The same in plain PyTorch, as models write it; float64 in gives float64 arithmetic."""
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype)).flatten(0, -2) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels.reshape(-1)
    keep = labels != ignore_index
    losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    total = (token_weights(weighting, logits, losses) * losses).sum()
    total = total + z_loss * (logits.logsumexp(-1).square() * keep).sum()
    return total / (keep.sum().clamp_min(1) if num_items is None else num_items)
