"""Several examples in one row, without attention between them, and the batches made of such rows.

Rows are filled by first-fit decreasing, which needs at most 11/9 of the fewest possible rows, plus one (Johnson 1973).
Position ids restart at 0 with every document. Given no attention mask and no cache, transformers from 5.17 builds a
block-diagonal causal mask from them (sdpa and eager attention, any batch size). With ``use_cache=True`` it does not,
and documents see each other: call the model with ``use_cache=False``, as TRL does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .labels import IGNORED

if TYPE_CHECKING:
    import torch


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put documents into rows of at most ``capacity`` tokens, by first-fit decreasing; O(n log n), deterministic.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a row.

    Returns:
        For each row, the indices of its documents.

    Raises:
        ValueError: a document is longer than a row, or empty.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"document {index} has {length} tokens, which do not fit rows of 1 to {capacity}")
    rows: list[list[int]] = []
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    # room[k] is the most space in any row below node k of a binary tree; leaf i is row i, empty rows have it all.
    room = [capacity] * (2 * leaves)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < lengths[index]:
                node += 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def join(documents: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """One row out of several documents, each with ``input_ids`` and ``labels``.

    The first label of each document is masked: it would be predicted from the last token of the one before.
    """
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for document in documents:
        row["input_ids"] += document["input_ids"]
        row["labels"] += [IGNORED, *document["labels"][1:]]
        row["seq_lengths"].append(len(document["input_ids"]))
    return row


@dataclass(frozen=True)
class Collator:
    """Rows to a batch of tensors, each ``[batch, length]`` of int64.

    Rows with ``seq_lengths`` are packed: the batch has ``input_ids, labels, position_ids`` and no attention mask, and
    padding is one more document. Other rows give ``input_ids, attention_mask, labels``, padded on the right. Padding
    is told by position, never by comparing ids, so a pad token that equals the end token does no harm.

    Args:
        pad_token_id: fills rows up.
        multiple_of: the length of a batch is rounded up to this.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        gaps = [length - len(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": [[*row["input_ids"], *[self.pad_token_id] * gap] for row, gap in zip(rows, gaps, strict=True)],
            "labels": [[*row["labels"], *[IGNORED] * gap] for row, gap in zip(rows, gaps, strict=True)],
        }
        if "seq_lengths" in rows[0]:
            lengths = [[*row["seq_lengths"], gap] for row, gap in zip(rows, gaps, strict=True)]
            batch["position_ids"] = [[p for n in row for p in range(n)] for row in lengths]
        else:
            batch["attention_mask"] = [[1] * (length - gap) + [0] * gap for gap in gaps]
        return {name: torch.tensor(values, dtype=torch.long) for name, values in batch.items()}
