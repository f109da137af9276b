"""Writes that outlast a crash, and a disk that is full."""

from __future__ import annotations

import errno
import os
import stat
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


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe, real, link = tmp_path / "pipe", tmp_path / "real", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "through")
    assert os.read(reader, 100) == b"through"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with real.open("w+") as file:
        file.write("before ")
        file.flush()
        write_atomically(Path(f"/dev/fd/{file.fileno()}"), "after")
    assert real.read_text() == "before after"
    link.symlink_to(real)
    write_atomically(link, "new")
    assert real.read_text() == "new"
    assert link.is_symlink()
    with pytest.raises(OSError) as full:
        write_atomically(Path("/dev/full"), "text")
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, "text")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file data/0"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("7202 requested and 6144 written"),
    ],
)
def test_the_words_of_torch_and_safetensors_for_a_full_disk(error: Exception) -> None:
    assert is_disk_error(error)
    assert not is_disk_error(ValueError("shape mismatch"))
