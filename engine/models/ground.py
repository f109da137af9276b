"""Ground: what some tunings need to begin beside the model that they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.packing import Collator


@dataclass(frozen=True)
class Ground:
    """What some tunings need beside the model.

    Args:
        folder: where its checkpoint lies (loftq reads the weights as they were before quantisation).
        tokenizer: with the new tokens in it already.
        steps: optimiser steps of the run (adalora takes ranks away over them).
        rows: tokenised rows (eva looks at what flows through the model).
        resumed: a checkpoint of adapters that is about to be read back; nothing has to be made up then.
    """

    folder: Path | None = None
    tokenizer: Any = None
    steps: int = 0
    rows: Callable[[], Iterable[dict[str, torch.Tensor]]] | None = None
    resumed: Path | None = None


def first_batches(rows: Any, tokenizer: Any, size: int = 4) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of tokenised rows in their own order."""
    collate = Collator(tokenizer.pad_token_id)
    for start in range(0, len(rows), size):
        yield collate([rows[i] for i in range(start, min(start + size, len(rows)))])
