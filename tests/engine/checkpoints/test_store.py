"""Checkpoints are whole or absent, damaged ones are told, and the newest sound one is found."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetui.engine.checkpoints import store
from finetui.planner.errors import TrainingError


def write(directory: Path, step: int, keep: int = 3) -> store.Checkpoint:
    partial = store.begin(directory, step)
    (partial / "model.safetensors").write_bytes(bytes([step % 256]) * 1000)
    (partial / "optimizer.pt").write_bytes(b"state")
    return store.commit(partial, step, keep=keep, facts={"tokens": step * 10})


def test_found_again_in_order_with_facts(tmp_path: Path) -> None:
    for step in (20, 200, 1_000_000):
        write(tmp_path, step)
    found = store.find(tmp_path)
    assert [c.step for c in found] == [20, 200, 1_000_000]
    assert found[0].path.name == "step-000020"
    assert found[0].facts == {"tokens": 200}
    assert found[0].bytes == 1005


def test_keeps_the_newest_n(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest", "no-manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path: Path, harm: str) -> None:
    write(tmp_path, 10)
    newest = write(tmp_path, 20).path
    weights, manifest = newest / "model.safetensors", newest / store.MANIFEST
    match harm:
        case "flip":
            weights.write_bytes(b"x" + weights.read_bytes()[1:])
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "remove":
            weights.unlink()
        case "manifest":
            manifest.write_text('{"step": 20, "fi')
        case "no-manifest":
            manifest.unlink()
    found = store.latest(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 10
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("step-000020: ")


def test_an_error_before_the_rename_leaves_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, keep=1)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError) as caught:
        write(tmp_path, 2, keep=1)
    assert caught.value.cause == "disk"
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert store.damage(tmp_path / "step-000001") is None


def test_a_real_limit_on_file_size_is_a_disk_error(tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys
from pathlib import Path
from finetui.engine.checkpoints import store
from finetui.engine.durable import reported_as_disk_error
from finetui.planner.errors import TrainingError
directory = Path({str(tmp_path)!r})
def write(step, size):
    partial = store.begin(directory, step)
    with reported_as_disk_error("it can't be written", directory):
        (partial / "model.safetensors").write_bytes(b"x" * size)
    store.commit(partial, step, keep=1)
write(1, 100)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write(2, 5000)
except TrainingError as error:
    sys.exit(7 if error.cause == "disk" else 8)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], check=False)
    assert done.returncode == 7
    assert [c.step for c in store.find(tmp_path)] == [1]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    partial = store.begin(tmp_path, 5)
    (partial / "model.safetensors").write_bytes(b"half")
    assert store.find(tmp_path) == []
    assert store.latest(tmp_path).checkpoint is None
    write(tmp_path, 6)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000006"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (write(tmp_path, 5).path / "optimizer.pt").unlink()
    write(tmp_path, 5)
    assert store.damage(tmp_path / "step-000005") is None


def test_a_damaged_later_one_never_outlives_a_sound_one(tmp_path: Path) -> None:
    write(tmp_path, 10)
    weights = write(tmp_path, 20).path / "model.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])  # of full size, so that only its content tells
    assert store.latest(tmp_path).checkpoint == store.find(tmp_path)[0]
    write(tmp_path, 11, keep=1)  # training went on from 10
    assert [found.step for found in store.find(tmp_path)] == [11]
    assert store.latest(tmp_path).skipped == []


def test_a_sound_one_of_the_same_step_stays_as_it_is(tmp_path: Path) -> None:
    first = write(tmp_path, 5).path / "optimizer.pt"
    inode = first.stat().st_ino
    assert write(tmp_path, 5, keep=1).step == 5
    assert first.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_one_that_is_removed_while_it_is_looked_at_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    path = write(tmp_path, 5).path
    look = store._shallow_damage

    def then_gone(path: Path) -> str | None:
        told = look(path)
        shutil.rmtree(path)
        return told

    monkeypatch.setattr(store, "_shallow_damage", then_gone)
    assert store.find(tmp_path) == []
    monkeypatch.undo()
    path = write(tmp_path, 6).path
    monkeypatch.setattr(store, "_shallow_damage", then_gone)
    assert "can't be read" in str(store.damage(path))


def test_folders_inside_are_flushed_and_listed_too(tmp_path: Path) -> None:
    partial = store.begin(tmp_path, 1)
    (partial / "adapter").mkdir()
    (partial / "adapter" / "weights").write_bytes(b"w")
    path = store.commit(partial, 1, keep=1).path
    assert store.damage(path) is None
    (path / "adapter" / "weights").write_bytes(b"v")
    assert store.damage(path) == "adapter/weights has other content than was written"


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    path = write(tmp_path, 1).path
    listed = json.loads((path / store.MANIFEST).read_text())["files"]
    assert set(listed) == {p.name for p in path.iterdir()} - {store.MANIFEST}


def test_reading_checkpoints_needs_no_torch() -> None:
    code = "import sys, finetui.engine.checkpoints.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
