"""Checkpoints of a run as they are made: copied while training waits, written and proven while it goes on.

A step waits for a copy of the tensors in host memory, not for a disk. Where the host has no room for one, the step
waits until all is written, and an event says so. The first checkpoint of an attempt is loaded back and compared with
what was to be written, so that a run that can't save fails within its first minute and not after its first hour.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from ...planner.cgroup import memory_limit
from ...planner.errors import TrainingError
from ..checkpoints import store
from ..checkpoints.writer import Writer
from ..durable import reported_as_disk_error
from ..events import CheckpointSaved, Fallback, LogLine, Warn
from ..models.load import Emit
from .state import FILES_AT_ONCE, HostMemory, Part, Snapshot

#: Share of the free host memory that the copy of a checkpoint may take.
_SHARE = 0.8


class Saver:
    """Writes checkpoints, one at a time. Rank 0 has the one that does; the others' have nothing to do.

    Args:
        directory: the folder of all checkpoints.
        keep: how many stay.
        emit: receives events, from two threads.
    """

    def __init__(self, directory: Path, keep: int, emit: Emit) -> None:
        self.directory, self.keep, self.emit = directory, keep, emit
        self._writer = Writer()
        self._host = HostMemory()
        self._proven = False
        self._told_of_room = False

    @property
    def failed(self) -> bool:
        """Whether the latest checkpoint could not be written, which nobody has been told yet."""
        return self._writer.failed

    def save(
        self, step: int, snapshot: Snapshot, facts: dict[str, Any], done: Callable[[], None] = lambda: None,
        since: float | None = None,
    ) -> float:  # fmt: skip
        """Write one checkpoint, in the background if there is room for a copy of it.

        Args:
            snapshot: refers to what training will change.
            done: called when the checkpoint is complete, perhaps from another thread.
            since: when the caller began to put it together, by ``time.perf_counter``; it has waited since.

        Returns:
            Seconds that the caller waited.

        Raises:
            TrainingError: there is no room on the disk for this one or for the one before (cause ``disk``).
            OSError: the folder can't be written for another reason.
        """
        began = time.perf_counter() if since is None else since
        self._writer.wait()
        kept = snapshot.copied(self._host) if self._has_room(snapshot) else None
        waited = time.perf_counter() - began

        def write(what: Snapshot, waited_s: float | None = None) -> None:
            saved = self._written(step, what, facts)
            seconds = time.perf_counter() - began
            waited_s = seconds if waited_s is None else waited_s
            path = f"checkpoints/{saved.path.name}"
            self.emit(CheckpointSaved(step, path, saved.bytes, round(seconds, 3), round(waited_s, 4)))
            done()

        if kept is None:
            write(snapshot)
        else:
            self._writer.submit(lambda: write(kept, waited))
        return time.perf_counter() - began

    def wait(self) -> None:
        """Return when all is on the disk.

        Raises:
            TrainingError: there was no room (cause ``disk``).
            OSError: the folder can't be written for another reason.
        """
        self._writer.wait()

    def end(self) -> None:
        """As :meth:`wait`, for a run that has failed already: what goes wrong here is a warning beside that."""
        try:
            self._writer.wait()
        except (TrainingError, OSError) as error:
            self.emit(Warn(f"the last checkpoint was not written ({error})", "checkpoints", "An older one is there."))

    def _has_room(self, snapshot: Snapshot) -> bool:
        free, limit = psutil.virtual_memory().available, memory_limit()
        if limit is not None:
            free = min(free, limit.limit - limit.used)
        free += self._host.bytes  # from the checkpoint before
        if snapshot.private or snapshot.bytes <= _SHARE * free:
            return True
        if not self._told_of_room:
            self._told_of_room = True
            need = f"{snapshot.bytes / 2**30:.1f} GiB for a copy, {free / 2**30:.1f} GiB free in host memory"
            self.emit(Fallback("steps wait while a checkpoint is written", need))
        return False

    # --- in the background

    def _written(self, step: int, snapshot: Snapshot, facts: dict[str, Any]) -> store.Checkpoint:
        """Written and verified; on a full disk once more, with only the newest of the older ones beside it."""
        try:
            return self._attempt(step, snapshot, facts)
        except TrainingError as error:
            older = len(store.find(self.directory))
            if error.cause != "disk" or older < 2:
                raise
            store.prune(self.directory, 1, newest=step)
            self.emit(Fallback(f"one older checkpoint is kept instead of {older}", "the disk is full"))
            return self._attempt(step, snapshot, facts)

    def _attempt(self, step: int, snapshot: Snapshot, facts: dict[str, Any]) -> store.Checkpoint:
        partial = store.begin(self.directory, step)
        try:
            with reported_as_disk_error("the checkpoint can't be written", self.directory):
                hashes = snapshot.write(partial)
        except BaseException:
            store.discard(partial)
            raise
        saved = store.commit(partial, step, keep=self.keep, facts=facts, hashes=hashes)
        if not self._proven:
            began = time.perf_counter()
            loads_back(saved.path, snapshot)
            self._proven = True
            seconds = time.perf_counter() - began
            self.emit(LogLine(0, f"the first checkpoint was loaded back and is what was saved ({seconds:.2f} s)"))
        return saved


def loads_back(folder: Path, snapshot: Snapshot) -> None:
    """Load every file of tensors and compare it with what was to be written.

    Raises:
        TrainingError: one can't be loaded, or holds something else (cause ``disk``).
    """
    from safetensors import safe_open

    parts = {**snapshot.parts, **snapshot.arrange(dict(snapshot.weights))}

    def load_back(name: str) -> None:
        part = parts[name]
        if not isinstance(part, Part):
            return
        try:
            with safe_open(folder / name, "pt") as file:
                same = set(file.keys()) == set(part.tensors) and all(
                    _same(file.get_tensor(key), tensor) for key, tensor in part.tensors.items()
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise _useless(folder, f"{name} can't be loaded ({error})") from error
        if not same:
            raise _useless(folder, f"{name} is not what was saved")

    with ThreadPoolExecutor(FILES_AT_ONCE, "proof") as beside:
        list(beside.map(load_back, parts))


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit, so that a nan equals itself."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
    return bool(torch.equal(a, b))


def _useless(folder: Path, what: str) -> TrainingError:
    return TrainingError(
        f"the first checkpoint can't be read back: {what}",
        cause="disk",
        where=str(folder),
        do="Training would be lost at the first interruption. Put the run on another disk with FINETUI_RUNS=FOLDER.",
    )
