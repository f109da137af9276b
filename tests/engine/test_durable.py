"""Writes that outlast a crash, and a disk that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from finetui.engine.durable import is_disk_error, write_atomically


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "a" * 100_000)
    child = os.fork()
    if child == 0:
        for letter in "bcdefghij":
            write_atomically(path, letter * 100_000)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        text = path.read_text()
        assert text == text[0] * 100_000
    assert path.read_text()[0] == "j"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file data/0"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_the_words_of_torch_and_safetensors_for_a_full_disk(error: Exception) -> None:
    assert is_disk_error(error)
    assert not is_disk_error(ValueError("shape mismatch"))
