"""Runs in the background: what they survive, and how they are ended and continued."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import finetui
from finetui.engine import launcher
from finetui.engine.events import Event, follow, read_events
from finetui.engine.run import Run
from finetui.planner.errors import RunError

FAKE = str(Path(__file__).with_name("fake_rank.py"))

#: Starts a run as a shell's child would: a process of its own, which is then treated badly.
STARTER = """
import sys, time
from finetui.engine import launcher
from finetui.engine.run import Run
print("pid", launcher.start(Run(sys.argv[1]), worker=(sys.argv[2], sys.argv[3])), flush=True)
time.sleep(60)
"""


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def steps(run: Run) -> int:
    return sum(event.type == "step" for event in read_events(run.events_path))


def environment() -> dict[str, str]:
    folder = str(Path(finetui.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))}


def test_a_run_started_in_a_terminal_that_closes_goes_on(make_run: Callable[..., Run]) -> None:
    run = make_run()
    child, master = pty.fork()
    if child == 0:  # a session of its own with the pty as its terminal
        os.execve(sys.executable, [sys.executable, "-P", "-c", STARTER, str(run.path), FAKE, "finish"], environment())
    until(lambda: b"pid" in os.read(master, 1000))
    assert run.status.state == "preparing"
    os.close(master)  # hangs up: the kernel sends SIGHUP to the starter
    _, how = os.waitpid(child, 0)
    assert os.WTERMSIG(how) == signal.SIGHUP
    until(lambda: not run.live)
    assert run.status.state == "finished"
    assert steps(run) == 15


def test_a_run_survives_signals_to_its_starter_and_that_ones_group(make_run: Callable[..., Run]) -> None:
    run = make_run()
    command = [sys.executable, "-P", "-c", STARTER, str(run.path), FAKE, "finish"]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), start_new_session=True, cwd="/")
    assert starter.stdout is not None
    pid = int(starter.stdout.readline().split()[1])
    assert os.getsid(pid) == pid
    os.killpg(starter.pid, signal.SIGHUP)
    os.killpg(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    until(lambda: not run.live)
    assert run.status.state == "finished"


def test_two_followers_read_the_same_events(make_run: Callable[..., Run]) -> None:
    run = make_run()
    seen: list[list[Event]] = [[], []]

    def watch(events: list[Event]) -> None:
        for event in follow(run.events_path, poll_s=0.02):
            events.append(event)
            if event.type == "state" and event.data["state"] == "finished":
                return

    watchers = [threading.Thread(target=watch, args=(events,)) for events in seen]
    for watcher in watchers:
        watcher.start()
    launcher.start(run, worker=(FAKE, "finish"))
    for watcher in watchers:
        watcher.join(60)
    assert seen[0] == seen[1] == read_events(run.events_path)
    assert [event.seq for event in seen[0]] == list(range(1, len(seen[0]) + 1))


def test_sigkill_of_the_supervisor_ends_the_ranks_and_the_run_can_be_resumed(make_run: Callable[..., Run]) -> None:
    run = make_run(gpus=[0, 1])
    pid = launcher.start(run, worker=(FAKE, "endless"))
    assert run.recorded.pid == pid
    until(lambda: steps(run) >= 2 and (run.path / "pid1").exists())
    ranks = [int((run.path / f"pid{rank}").read_text()) for rank in (0, 1)]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not any(psutil.pid_exists(rank) for rank in ranks), 15.0)
    until(lambda: run.status.state == "lost", 15.0)
    assert "finetui resume" in run.status.do
    spent = run.status.elapsed_s()
    with pytest.raises(RunError, match="it is lost"):
        launcher.stop(run)

    launcher.resume(run, worker=(FAKE, "finish"))
    until(lambda: not run.live)
    assert run.status.state == "finished"
    assert run.recorded.attempt == 2
    assert run.recorded.spent_s == pytest.approx(spent, abs=0.5)
    warnings = [event.data["what"] for event in read_events(run.events_path) if event.type == "warning"]
    assert warnings == ["there is no complete checkpoint: training starts from the beginning"]
    with pytest.raises(RunError, match="nothing to resume"):
        launcher.resume(run, worker=(FAKE, "finish"))


def test_stop_is_idempotent_and_refused_when_nothing_runs(make_run: Callable[..., Run]) -> None:
    run = make_run()
    launcher.start(run, worker=(FAKE, "endless"))
    with pytest.raises(RunError, match="is at work already"):
        launcher.start(run, worker=(FAKE, "endless"))
    with pytest.raises(RunError, match="is at work"):
        launcher.resume(run, worker=(FAKE, "endless"))
    until(lambda: steps(run) >= 1)
    launcher.checkpoint_now(run)
    assert run.requested("checkpoint")
    launcher.stop(run)
    launcher.stop(run)
    until(lambda: not run.live)
    assert run.status.state == "stopped"
    for verb in (launcher.stop, launcher.checkpoint_now, launcher.kill):
        with pytest.raises(RunError, match="has stopped"):
            verb(run)
    launcher.resume(run, worker=(FAKE, "finish"))
    until(lambda: not run.live)
    assert run.status.state == "finished"


def test_kill_ends_ranks_that_ignore_sigterm(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    pid = launcher.start(run, worker=(FAKE, "deaf"))
    until(lambda: (run.path / "pid0").exists())
    launcher.kill(run)
    assert not psutil.pid_exists(int((run.path / "pid0").read_text()))
    until(lambda: not psutil.pid_exists(pid), 15.0)
    assert run.status.state == "stopped"
    assert "without a checkpoint" in run.status.message


def test_kill_ends_a_supervisor_that_does_not_answer(make_run: Callable[..., Run]) -> None:
    run = make_run()
    pid = launcher.start(run, worker=(FAKE, "endless"))
    until(lambda: steps(run) >= 1)
    os.kill(pid, signal.SIGSTOP)
    launcher.kill(run, grace_s=0.3)
    assert not psutil.pid_exists(int((run.path / "pid0").read_text()))
    assert run.status.state == "stopped"


def test_a_supervisor_that_can_not_start_is_told_with_its_reason(make_run: Callable[..., Run]) -> None:
    run = make_run()
    lock = run.claim()
    with pytest.raises(RunError, match="another process is at work"):
        launcher.start(run, worker=(FAKE, "finish"))
    os.close(lock)
    (run.path / "plan.json").write_text("{")
    with pytest.raises(RunError, match="the plan can't be read"):
        launcher.start(run, worker=(FAKE, "finish"))


def test_a_run_starts_with_a_home_that_can_not_be_written(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    run = make_run()
    launcher.start(run, worker=(FAKE, "finish"))
    until(lambda: not run.live)
    assert run.status.state == "finished"


def test_children_find_the_package_from_any_folder(tmp_path: Path) -> None:
    probe = "import json, finetui.engine.launcher as l; print(json.dumps([l.__file__, l.import_environment()]))"
    folder = str(Path(finetui.__file__).parent.parent)
    relative = {**os.environ, "PYTHONPATH": os.path.relpath(folder, tmp_path)}
    answer = subprocess.run([sys.executable, "-P", "-c", probe], env=relative, cwd=tmp_path, capture_output=True)
    file, extra = json.loads(answer.stdout)
    again = subprocess.run(
        [sys.executable, "-P", "-c", probe], env={**os.environ, **extra}, cwd="/", capture_output=True
    )
    assert Path(json.loads(again.stdout)[0]) == Path(os.path.normpath(tmp_path / file))
