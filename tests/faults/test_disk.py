"""A disk without room: the run ends with that cause and an intact checkpoint, and goes on once there is room."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine.checkpoints import store
from finetui.engine.export import export_run
from finetui.engine.run import Run
from finetui.planner.errors import TrainingError

from .harness import Forge, finish, gone, killed_after, result_of, told, wait_until

MakeRun = Callable[..., Run]


@pytest.fixture
def disk(file_system: Callable[[int], Path]) -> Path:
    """A file system of 24 MiB."""
    return file_system(24)


def fill(folder: Path, leave: int) -> Path:
    """Take all room but a little."""
    path = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    path.write_bytes(os.urandom(max(0, free - leave)))
    return path


#: A checkpoint larger than the room that a run keeps for its last words.
LARGE = {"type": "lora", "rank": 64}


@pytest.mark.parametrize("leave", [64 * 1024, 0], ids=["checkpoint", "event and log"])
def test_a_full_disk_ends_the_run_and_costs_nothing_but_steps(
    forge: Forge, a_run: MakeRun, disk: Path, leave: int
) -> None:
    recipe = {"tuning": LARGE, "checkpoint": {"every": 2, "keep": 1}}
    peaceful, run = a_run(40, **recipe), a_run(40, root=disk / "runs", **recipe)
    finish(forge, peaceful)
    killed_after(forge, run, 2)
    filler = fill(disk, leave)
    supervisor = forge.start(run)
    wait_until(lambda: gone(supervisor))
    status = run.recorded
    assert (status.state, status.cause) == ("failed", "disk"), status
    assert "resume" in status.do
    kept = store.find(run.path / "checkpoints")
    assert kept
    assert store.latest(run.path / "checkpoints").checkpoint == kept[-1]
    filler.unlink()
    finish(forge, run)
    assert result_of(run) == result_of(peaceful)


def test_where_there_is_no_room_for_all_older_checkpoints_make_way(forge: Forge, a_run: MakeRun, disk: Path) -> None:
    recipe = {"tuning": LARGE, "checkpoint": {"every": 2, "keep": 4}}
    peaceful, run = a_run(40, **recipe), a_run(40, root=disk / "runs", **recipe)
    finish(forge, peaceful)
    killed_after(forge, run, 2)
    fill(disk, store.find(run.path / "checkpoints")[0].bytes * 3 // 2)
    finish(forge, run)
    assert {event.data["why"] for event in told(run, "fallback")} == {"the disk is full"}
    assert result_of(run) == result_of(peaceful)


def test_an_export_to_a_full_disk_leaves_nothing_behind(forge: Forge, a_run: MakeRun, disk: Path) -> None:
    run = a_run(steps=1)
    supervisor = forge.start(run)
    wait_until(lambda: gone(supervisor))
    (disk / "full").write_bytes(b"what was there before")
    fill(disk, 16 * 1024)
    with pytest.raises(TrainingError) as caught:
        export_run(run, "adapter", disk / "exported")
    assert caught.value.cause == "disk"
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "full"]
