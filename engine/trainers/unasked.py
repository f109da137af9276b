"""Spare transformers a question that a batch has answered: which positions may look at which.

Given no mask, transformers compares position ids to find out whether rows are packed
(``masking_utils.find_packed_sequence_indices``), and reads the answer back from the device in every forward pass: the
host, which should run ahead, waits. For packed rows it then makes a mask of one value per pair of positions, and while
a CUDA graph is recorded it makes one in any case. Layers that are told of documents need neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import masking_utils

from ...kernels.attention import Documents

_NAME = "find_packed_sequence_indices"


def plainly_causal(config: Any, length: int) -> bool:
    """Whether rows of so many tokens see plain causal attention, but for documents: no window is narrower."""
    return _known() and not _narrower(config, length)


def told(inputs: dict[str, Any], config: Any) -> tuple[dict[str, Any], bool]:
    """What layers that know documents and windows are given, and whether they need no masks then.

    Without a mask a layer sees all earlier positions of its row, unless it is told of documents: rows longer than a
    window are documents, one each.

    Args:
        inputs: of a micro-batch without padding: ``input_ids``; of packed rows also ``position_ids`` and ``documents``.
    """
    rows, length = inputs["input_ids"].shape
    packed = "position_ids" in inputs
    if packed and "documents" not in inputs:
        return inputs, False
    if plainly_causal(config, length):
        return inputs, True
    if not _known() or _narrower(config, length) != {"sliding_window"}:
        return inputs, False
    if "documents" not in inputs:
        starts = torch.arange(rows + 1, dtype=torch.int32, device=inputs["input_ids"].device) * length
        inputs = {**inputs, "documents": Documents((length,) * rows, starts)}
    return inputs, True


def _known() -> bool:
    return hasattr(masking_utils, _NAME) and "sdpa" in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS


def _narrower(config: Any, length: int) -> set[str]:
    """What cuts attention short in rows of so many tokens."""
    limits = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    return {name for name, limit in limits.items() if limit is not None and length > limit}


@contextlib.contextmanager
def no_masks() -> Iterator[None]:
    """Within, models make no masks: rows are whole, or their layers know the documents in them."""
    masks, stock = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, getattr(masking_utils, _NAME)
    setattr(masking_utils, _NAME, lambda position_ids: None)
    masks["sdpa"] = lambda **_: None
    try:
        yield
    finally:
        setattr(masking_utils, _NAME, stock)
        del masks["sdpa"]
