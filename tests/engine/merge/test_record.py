"""Hashes: read, or taken from the names of the Hub's blobs."""

from __future__ import annotations

import hashlib
from pathlib import Path

from finetui.engine.merge.record import hashes_of


def test_a_file_of_the_hubs_cache_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "c0ffee").mkdir(parents=True)
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_bytes(b"weights")
    link = tmp_path / "snapshots" / "c0ffee" / "model.safetensors"
    link.symlink_to(blob)
    assert hashes_of([link]) == {"model.safetensors": "ab" * 32}
    plain = tmp_path / "model.safetensors"
    plain.write_bytes(b"weights")
    assert hashes_of([plain]) == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
