"""Safetensors shards written as a stream: one tensor in memory at a time, whatever the size of the model.

All shapes and formats are known before the first tensor is made, so the header can be written first
(https://huggingface.co/docs/safetensors, "Format"): eight bytes with its length, little-endian; JSON from names to
dtype, shape and byte range; the tensors' bytes without gaps. Files have no more than 5 GiB, as those of transformers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .layout import Piece

#: Bytes of tensors in one file; a larger tensor has a file of its own.
LARGEST = 5 << 30
#: Bytes per number, by dtype of a header.
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
WIDTHS |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
INDEX = "model.safetensors.index.json"


def size_of(piece: Piece) -> int:
    """Bytes of a tensor of the result."""
    return piece.numel * WIDTHS[piece.dtype]


def shards_of(pieces: Sequence[Piece], largest: int = LARGEST) -> dict[str, list[Piece]]:
    """Which tensors go into which file, in their order; wide formats first in each, so that all are aligned."""
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if groups[-1] and filled + size_of(piece) > largest:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += size_of(piece)
    count = len(groups)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    names = ["model.safetensors"] if count == 1 else names
    return {
        name: sorted(group, key=lambda piece: -WIDTHS[piece.dtype]) for name, group in zip(names, groups, strict=True)
    }


def write_shards(folder: Path, shards: dict[str, list[Piece]], make: Callable[[Piece], torch.Tensor]) -> dict[str, str]:
    """Write all shards, and an index if there are several.

    Args:
        make: the tensor of a piece, of its dtype and shape.

    Returns:
        The SHA-256 of each file of tensors.
    """
    hashes = {}
    for name, pieces in shards.items():
        hashes[name] = _write(folder / name, pieces, make)
    if len(shards) > 1:
        places = {piece.name: name for name, pieces in shards.items() for piece in pieces}
        total = sum(size_of(piece) for pieces in shards.values() for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return hashes


def _write(path: Path, pieces: Sequence[Piece], make: Callable[[Piece], torch.Tensor]) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(_header(pieces))
        for piece in pieces:
            tensor = make(piece)
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
            if len(raw) != size_of(piece):
                raise AssertionError(f"{piece.name} has {len(raw)} bytes, not {size_of(piece)}")
            put(raw)
    return digest.hexdigest()


def _header(pieces: Sequence[Piece]) -> bytes:
    told: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for piece in pieces:
        end = begin + size_of(piece)
        told[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
