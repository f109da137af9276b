"""Runs that were moved or copied, and runs that another release of finetui began."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from finetui.engine.events import read_events
from finetui.engine.run import Run, list_runs
from finetui.engine.supervision.outcome import Outcome
from finetui.engine.supervisor import supervise
from finetui.planner.version import VERSION

FAKE = str(Path(__file__).with_name("fake_rank.py"))


def test_runs_that_were_moved_open_where_they_are(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(name="a")
    assert supervise(run, worker=(FAKE, "finish")) == Outcome("finished")
    shutil.move(run.path.parent, tmp_path / "elsewhere")
    moved = Run.open("a", root=tmp_path / "elsewhere")
    assert moved.status.state == "finished"
    assert moved.plan.resolved.steps == 15
    assert len(read_events(moved.events_path)) > 15
    assert Run.open(tmp_path / "elsewhere" / "a").path == moved.path
    assert [found.name for found in list_runs(tmp_path / "elsewhere")] == ["a"]  # the old place is no run any more


def test_a_stopped_run_goes_on_where_it_was_moved_to(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(name="a")
    assert supervise(run, worker=(FAKE, "silent-crash")).state == "failed"
    shutil.move(run.path, tmp_path / "b")
    moved = Run.open(tmp_path / "b")
    assert supervise(moved, worker=(FAKE, "finish")) == Outcome("finished")
    assert moved.recorded.attempt == 2


def test_a_copy_of_a_run_at_work_is_nobodys(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(name="a")
    code = "import sys; from finetui.engine.supervisor import main; main([sys.argv[1], '--', *sys.argv[2:]])"
    process = subprocess.Popen([sys.executable, "-P", "-c", code, str(run.path), FAKE, "endless"])
    try:
        end = time.monotonic() + 120
        while run.recorded.state != "running":
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)
        copy = Run(shutil.copytree(run.path, tmp_path / "copy"))
        assert (run.status.state, copy.status.state) == ("running", "lost")
        moved = Run(run.path.rename(tmp_path / "moved"))
        assert moved.status.state == "running"  # whoever is at work on it still is
        moved.path.rename(run.path)
        run.request("stop")
        assert process.wait(120) == 0
        assert run.status.state == "stopped"
    finally:
        process.kill()
        process.wait()


def test_another_release_goes_on_and_says_so(make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert supervise(run, worker=(FAKE, "silent-crash")).state == "failed"
    path = run.path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": "9.9.9", "of_a_later_release": [1, 2]}))
    assert supervise(run, worker=(FAKE, "finish")) == Outcome("finished")
    tree = json.loads(path.read_text())
    assert tree["of_a_later_release"] == [1, 2]
    assert tree["version"] == VERSION
    told = [event.data["what"] for event in read_events(run.events_path) if event.type == "warning"]
    assert f"it was begun by finetui 9.9.9 and goes on with {VERSION}" in told
