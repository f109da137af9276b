"""The copy of a run in a place that knows neither locks nor renames, and the run that comes back from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.checkpoints.store import MANIFEST, begin, commit, damage, find, folder_name
from finetui.engine.cluster import keep as module
from finetui.engine.cluster.keep import Keep
from finetui.engine.events import Step, read_events
from finetui.engine.run import Run


def save(run: Run, step: int, keep: int = 2) -> None:
    partial = begin(run.path / "checkpoints", step)
    (partial / "adapter").mkdir()
    (partial / "adapter" / "weights.bin").write_bytes(bytes([step]) * 1000)
    (partial / "state.bin").write_bytes(bytes([step]) * 500)
    commit(partial, step, keep=keep)


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in find(folder / "checkpoints")]


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    made = make_run(name="kept")
    made.update(state="running", host="a machine that is gone", started=1000.0)
    made.append(Step(1, 0.1, 2.0, 1e-4, 1.0, 10, 100.0, 0.05, 16))
    return made


def test_a_run_comes_back_and_can_go_on(run: Run, tmp_path: Path) -> None:
    save(run, 5)
    (run.path / "best").mkdir()
    (run.path / "best" / "weights.bin").write_bytes(b"best")
    Keep(run.path.parent, run.name, tmp_path / "bucket").copy()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert Keep(elsewhere, run.name, tmp_path / "bucket").restore()
    back = Run(elsewhere / run.name)
    assert steps(back.path) == [5]
    assert damage(back.path / "checkpoints" / folder_name(5)) is None
    assert (back.path / "best" / "weights.bin").read_bytes() == b"best"
    assert back.recipe == run.recipe
    assert back.plan == run.plan
    assert [event.type for event in read_events(back.events_path)].count("step") == 1
    # Whoever was at work on it is not any more, though its machine can't be asked.
    assert run.status.state in ("running", "lost")
    assert back.status.state == "stopped"


def test_the_copy_follows_the_run(run: Run, tmp_path: Path) -> None:
    keep, copy = Keep(run.path.parent, run.name, tmp_path / "bucket"), tmp_path / "bucket" / run.name
    for step in (1, 2, 3):
        save(run, step)
        keep.copy()
    assert steps(copy) == steps(run.path) == [2, 3]
    run.append(Step(2, 0.1, 2.0, 1e-4, 1.0, 10, 100.0, 0.05, 16))
    keep.copy()
    assert (copy / "events.jsonl").read_bytes() == run.events_path.read_bytes()
    assert not (copy / "control").exists()


def test_what_has_not_changed_is_left_alone(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    keep = Keep(run.path.parent, run.name, tmp_path / "bucket")
    keep.copy()
    copied: list[str] = []
    monkeypatch.setattr(module.shutil, "copyfile", lambda source, target: copied.append(Path(source).name))
    keep.copy()
    assert copied == []
    run.append(Step(2, 0.1, 2.0, 1e-4, 1.0, 10, 100.0, 0.05, 16))
    keep.copy()
    assert copied == ["events.jsonl"]


def test_a_machine_that_goes_while_it_copies(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    keep, copy = Keep(run.path.parent, run.name, tmp_path / "bucket"), tmp_path / "bucket" / run.name
    keep.copy()
    save(run, 2)
    real = shutil.copyfile

    def breaks(source: Any, target: Any) -> Any:
        if Path(source).name == MANIFEST:
            raise OSError("the machine is gone")
        return real(source, target)

    monkeypatch.setattr(module.shutil, "copyfile", breaks)
    with pytest.raises(OSError, match="gone"):
        keep.copy()
    assert (copy / "checkpoints" / folder_name(2) / "state.bin").exists()
    assert steps(copy) == [1]  # without its manifest the new one is none, and the old one is still there
    monkeypatch.setattr(module.shutil, "copyfile", real)
    elsewhere = tmp_path / "elsewhere"
    assert Keep(elsewhere, run.name, tmp_path / "bucket").restore()
    assert steps(elsewhere / run.name) == [1]
    keep.copy()
    assert steps(copy) == [1, 2]


def test_a_checkpoint_that_goes_while_it_is_copied(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1, keep=3)
    save(run, 2, keep=3)
    keep, real = Keep(run.path.parent, run.name, tmp_path / "bucket"), shutil.copyfile

    def removes(source: Any, target: Any) -> Any:
        if folder_name(1) in str(source):
            shutil.rmtree(run.path / "checkpoints" / folder_name(1), ignore_errors=True)
        return real(source, target)

    monkeypatch.setattr(module.shutil, "copyfile", removes)
    keep.copy()
    assert steps(tmp_path / "bucket" / run.name) == [2]


def test_a_run_that_is_here_stays_as_it_is(run: Run, tmp_path: Path) -> None:
    keep = Keep(run.path.parent, run.name, tmp_path / "bucket")
    assert not keep.restore()  # nothing is kept yet
    keep.copy()
    run.append(Step(2, 0.1, 2.0, 1e-4, 1.0, 10, 100.0, 0.05, 16))
    before = run.events_path.read_bytes()
    assert not keep.restore()
    assert run.events_path.read_bytes() == before


def test_stages_come_along(run: Run, make_run: Callable[..., Run], tmp_path: Path) -> None:
    stage, other = make_run(name="kept.1-sft"), make_run(name="kept-other")
    save(stage, 4)
    Keep(run.path.parent, run.name, tmp_path / "bucket").copy()
    assert Keep(tmp_path / "elsewhere", run.name, tmp_path / "bucket").restore()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["kept", "kept.1-sft"]
    assert steps(tmp_path / "elsewhere" / stage.name) == [4]
    assert other.path.exists()
