"""Safetensors written as a stream are read by safetensors, with the hash of what is there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetui.engine.merge.layout import Piece
from finetui.engine.merge.write import shards_of, write_shards

MADE = {
    "a": torch.arange(6.0).reshape(2, 3).bfloat16(), "b": torch.tensor([7], dtype=torch.int64),
    "c": torch.tensor(2.5), "d": torch.zeros(0, 4), "e": torch.arange(5.0),
}  # fmt: skip
DTYPES = {torch.bfloat16: "BF16", torch.int64: "I64", torch.float32: "F32"}
PIECES = [Piece(name, DTYPES[t.dtype], tuple(t.shape), ()) for name, t in MADE.items()]


@pytest.mark.parametrize(("largest", "files"), [(1 << 20, 1), (20, 3), (1, 5)])
def test_what_is_written_is_read(tmp_path: Path, largest: int, files: int) -> None:
    shards = shards_of(PIECES, largest)
    hashes = write_shards(tmp_path, shards, lambda piece: MADE[piece.name])
    assert len(hashes) == files == len(list(tmp_path.glob("*.safetensors")))
    read = {}
    for name, digest in hashes.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
        read |= load_file(tmp_path / name)
    assert read.keys() == MADE.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in MADE.items())
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        told = json.loads(index.read_text())
        assert told["metadata"]["total_size"] == sum(tensor.nbytes for tensor in MADE.values())
        assert all(name in load_file(tmp_path / file) for name, file in told["weight_map"].items())


def test_a_tensor_of_another_size_is_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a has 12 bytes, not 24"):
        write_shards(tmp_path, {"x": [Piece("a", "F32", (2, 3), ())]}, lambda piece: MADE["a"])
