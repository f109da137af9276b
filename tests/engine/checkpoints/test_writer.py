"""Work in the background is done in turn, and its errors come out."""

from __future__ import annotations

import threading

import pytest

from finetui.engine.checkpoints.writer import Writer


def test_one_at_a_time_and_in_order() -> None:
    writer, gate, done = Writer(), threading.Event(), list[int]()
    writer.submit(lambda: (gate.wait(10), done.append(1)))
    assert writer.busy
    assert done == []
    second = threading.Thread(target=lambda: writer.submit(lambda: done.append(2)))
    second.start()
    second.join(0.05)
    assert second.is_alive(), "the next waits for the one before"
    gate.set()
    second.join(10)
    writer.wait()
    assert done == [1, 2]
    assert not writer.busy


def test_an_error_comes_out_once_and_what_follows_is_not_begun() -> None:
    writer, done = Writer(), list[int]()

    def fail() -> None:
        raise OSError(28, "No space left on device")

    writer.submit(fail)
    writer.settle()
    assert writer.failed
    with pytest.raises(OSError, match="No space"):
        writer.submit(lambda: done.append(1))
    assert done == []
    assert not writer.failed
    writer.submit(lambda: done.append(2))
    writer.wait()
    assert done == [2]
