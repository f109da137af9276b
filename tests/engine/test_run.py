"""The run directory: made whole, found again, owned by one process, and true about that process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from finetui.engine import run as run_module
from finetui.engine.events import EventLog, read_events
from finetui.engine.run import RESERVE_BYTES, SILENCE_S, Run, list_runs
from finetui.planner.errors import RunError
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe
from finetui.planner.state import state_dir

RECIPE = Recipe.build({"model": "some/Model-1B"})


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def working(run: Run, pid: int, **changes: Any) -> None:
    """Enter a process as the run's supervisor."""
    known = {"pid_started": psutil.Process(pid).create_time(), "host": socket.gethostname(), "attempt": 1}
    run.update(**{"state": "running", "pid": pid, "started": time.time(), **known, **changes})


def fill(path: Path) -> None:
    """Write until there is no room."""
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_run_holds_what_was_asked_and_decided(make_run: Callable[..., Run], make_plan: Callable[..., Plan]) -> None:
    run = make_run({"limits": {"hours": 2}})
    assert run.recipe.limits.hours == 2
    assert run.plan == make_plan()
    assert run.status.state == "preparing"
    assert run.status.version
    assert {p.name for p in run.path.iterdir()} >= {"log", "control", "checkpoints", "events.jsonl", "run.json"}
    assert (run.path.stat().st_mode & 0o777) == 0o700


def test_death_while_a_run_is_made_leaves_no_run(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    child = os.fork()
    if child == 0:

        class Deadly(Plan):
            def save(self, path: str | Path) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

        Run.create(RECIPE, Deadly(**vars(make_plan())), root=tmp_path, name="doomed")
        os._exit(0)
    _, how = os.waitpid(child, 0)
    assert os.WIFSIGNALED(how)
    assert list_runs(tmp_path) == []
    assert not (tmp_path / "doomed").exists()
    Run.create(RECIPE, make_plan(), root=tmp_path, name="doomed")


def test_a_failure_while_a_run_is_made_leaves_nothing(
    tmp_path: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module, "write_atomically", full)
    with pytest.raises(RunError, match="No space left"):
        Run.create(RECIPE, make_plan(), root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names(make_run: Callable[..., Run]) -> None:
    first, second = make_run(), make_run()
    assert first.name.startswith("tiny-lora-")
    assert second.name == f"{first.name}-2"
    assert make_run(name="mine").name == "mine"
    with pytest.raises(RunError, match="exists already"):
        make_run(name="mine")
    for bad in ("", "..", "a/b", ".hidden", "-x", "a b", "é", "x" * 101):
        with pytest.raises(RunError, match="not a run name"):
            make_run(name=bad)


def test_runs_are_found_by_name_from_any_folder(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_run(name="first"), make_run(name="second")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("FINETUI_RUNS")
    assert {run.path for run in list_runs()} == {first.path, second.path}
    assert Run.open("first").path == Run.open("fir").path == first.path
    assert Run.open(second.path).path == second.path
    with pytest.raises(RunError, match=r"no run 'third'.* second, first"):
        Run.open("third")


def test_a_run_made_in_a_relative_folder_is_found_from_another(
    tmp_path: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    run = Run.create(RECIPE, make_plan(), root=Path("here"), name="mine")
    assert run.path == tmp_path / "here" / "mine"
    monkeypatch.chdir("/")
    assert Run.open("mine", root=tmp_path / "none").path == run.path


def test_what_is_no_run_is_left_out_of_the_list(make_run: Callable[..., Run]) -> None:
    run = make_run()
    (run.path.parent / "folder").mkdir()
    (run.path.parent / "file").touch()
    broken = make_run(name="broken")
    (broken.path / "run.json").write_text('{"state": ')
    assert [found.path for found in list_runs(run.path.parent)] == [run.path]
    with pytest.raises(RunError, match="not a run"):
        broken.status  # noqa: B018 - raises


def test_fields_of_a_later_release_are_ignored(make_run: Callable[..., Run]) -> None:
    run = make_run()
    tree = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**tree, "mood": "good"}))
    assert run.status.state == "preparing"


def test_a_process_that_is_killed_makes_its_run_lost(
    make_run: Callable[..., Run], sleeper: subprocess.Popen[bytes]
) -> None:
    run = make_run()
    working(run, sleeper.pid)
    assert run.status.state == "running"
    sleeper.kill()
    while psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert run.status.state == "lost", "a zombie does no work"
    sleeper.wait()
    assert run.status.state == "lost"
    assert run.recorded.state == "running"
    assert run.status.ended > 0


def test_a_run_that_a_full_disk_silenced_says_so(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    run.update(state="running", pid=2**22 + 1)  # above the kernel's largest
    assert "killed" in run.status.message
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    assert run.status.state == "lost"
    assert "its disk is full" in run.status.message
    assert run.status.do.startswith("Free some space")


def test_a_pid_that_now_belongs_to_another_process_makes_a_run_lost(
    make_run: Callable[..., Run], sleeper: subprocess.Popen[bytes]
) -> None:
    run = make_run()
    working(run, sleeper.pid, pid_started=psutil.Process(sleeper.pid).create_time() - 100)
    assert run.status.state == "lost"


def test_a_clock_that_was_set_does_not_make_a_run_lost(make_run: Callable[..., Run]) -> None:
    run = make_run()
    command = [sys.executable, "-c", "import time; time.sleep(60)", str(run.path)]
    with subprocess.Popen(command) as process:
        working(run, process.pid, pid_started=psutil.Process(process.pid).create_time() - 100)
        assert run.status.state == "running"
        process.kill()


def test_a_run_on_another_machine_is_lost_when_it_falls_silent(make_run: Callable[..., Run]) -> None:
    run = make_run()
    run.update(state="running", pid=1, host="elsewhere", started=1.0, created=1.0)
    assert run.status.state == "running"
    heard = time.time() - SILENCE_S - 1
    os.utime(run.events_path, (heard, heard))
    assert run.status.state == "lost"
    assert run.status.ended == pytest.approx(heard)


def test_a_run_that_never_starts_is_lost_after_a_minute(make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert run.live
    run.update(created=time.time() - 61)
    assert not run.live


def test_a_killed_process_may_hold_a_run_for_a_moment_longer(make_run: Callable[..., Run]) -> None:
    run = make_run()
    lock = run.claim()
    ended = subprocess.Popen(["true"])
    ended.wait()
    run.update(state="running", pid=ended.pid, pid_started=1.0)
    threading.Timer(0.2, os.close, [lock]).start()
    os.close(Run(run.path).claim())
    lock = run.claim()
    with pytest.raises(RunError, match="another process"):  # and no longer
        Run(run.path).claim()
    os.close(lock)


def test_one_process_claims_a_run(make_run: Callable[..., Run]) -> None:
    run = make_run()
    lock = run.claim()
    with pytest.raises(RunError, match="another process"):
        Run(run.path).claim()
    os.close(lock)
    os.close(run.claim())


def test_a_change_of_state_is_an_event_and_other_changes_are_not(make_run: Callable[..., Run]) -> None:
    run = make_run()
    run.update(started=5.0)
    run.update(state="failed", cause="oom", message="too big", do="less")
    (event,) = read_events(run.events_path)
    assert event.data == {"state": "failed", "cause": "oom", "message": "too big", "do": "less", "attempt": 0}
    assert run.recorded.started == 5.0


def test_concurrent_updates_lose_nothing(make_run: Callable[..., Run]) -> None:
    run = make_run()
    children = []
    for field in ("pid", "attempt"):
        child = os.fork()
        if child == 0:
            for value in range(1, 41):
                run.update(**{field: value})
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert (run.recorded.pid, run.recorded.attempt) == (40, 40)
    events = read_events(run.events_path)
    assert [event.seq for event in events] == list(range(1, 41))


def test_the_reserve_is_given_up_once_for_a_full_disk(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    run.hold_reserve()
    reserve = run.path / "control" / "reserve"
    assert reserve.stat().st_size == RESERVE_BYTES
    append, write = EventLog.append, run_module.write_atomically

    def full_while_reserved(real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            if reserve.exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        return guarded

    monkeypatch.setattr(run_module, "write_atomically", full_while_reserved(write))
    monkeypatch.setattr(EventLog, "append", full_while_reserved(append))
    run.update(state="failed", cause="disk")
    assert not reserve.exists()
    assert run.recorded.cause == "disk"
    assert read_events(run.events_path)[0].data["cause"] == "disk"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        run.update(state="finished")
    assert run.recorded.state == "failed"


def test_a_run_on_a_disk_that_is_really_full_still_says_how_it_ended(
    small_disk: Path, make_plan: Callable[..., Plan]
) -> None:
    run = Run.create(RECIPE, make_plan(), root=small_disk)
    run.hold_reserve()
    with pytest.raises(OSError, match="No space left"):
        fill(small_disk / "filler")
    before = run.events_path.read_bytes()
    run.update(state="failed", cause="disk", message="the disk is full")
    assert (run.status.state, run.status.cause) == ("failed", "disk")
    assert run.events_path.read_bytes().startswith(before)
    assert read_events(run.events_path)[-1].data["cause"] == "disk"


def test_requests_are_files(make_run: Callable[..., Run]) -> None:
    run = make_run()
    run.request("stop")
    run.request("stop")
    assert run.requested("stop")
    assert not run.requested("checkpoint")
    run.withdraw("stop")
    run.withdraw("stop")
    assert not run.requested("stop")


def test_what_is_wrong_with_a_run_that_is_named(make_run: Callable[..., Run]) -> None:
    run = make_run(name="damaged")
    (run.path / "run.json").write_text('{"state": 7', encoding="utf-8")
    longer = make_run(name="damaged-2")  # which is not taken for it
    with pytest.raises(RunError, match="this is not a run"):
        Run.open("damaged", root=run.path.parent)
    shutil.rmtree(run.path)
    with pytest.raises(RunError, match=r"the run's directory is gone: deleted or moved"):
        _ = run.recorded
    shutil.rmtree(longer.path)
    with pytest.raises(RunError, match="there is no run 'damaged'"):
        Run.open("damaged", root=run.path.parent)


def test_a_folder_of_runs_whose_name_is_no_text(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"by\xfftes")
    with pytest.raises(RunError, match="not UTF-8") as refused:
        Run.create(Recipe.build({"model": "tiny"}), make_plan(), root=root)
    assert refused.value.do
    assert str(refused.value).isprintable()
    assert not root.exists()


def test_a_run_in_a_folder_of_several_lines_is_found_again(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    run = Run.create(Recipe.build({"model": "tiny"}), make_plan(), root=tmp_path / "two\nlines", name="one")
    plain = Run.create(Recipe.build({"model": "tiny"}), make_plan(), root=tmp_path / "plain", name="two")
    assert {found.path for found in list_runs(tmp_path / "elsewhere")} == {run.path, plain.path}
    index = state_dir() / "runs"
    index.write_text('"a part of a line\n' + index.read_text(encoding="utf-8"), encoding="utf-8")
    assert {found.path for found in list_runs(tmp_path / "elsewhere")} == {run.path, plain.path}
