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

from transformers import masking_utils

_NAME = "find_packed_sequence_indices"


def plainly_causal(config: Any, length: int) -> bool:
    """Whether rows of so many tokens see plain causal attention, but for documents: no window is narrower."""
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    known = hasattr(masking_utils, _NAME) and "sdpa" in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    return known and all(window is None or length <= window for window in windows)


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
