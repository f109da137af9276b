"""One attempt in a job: what it starts, what it passes on, and the exit codes that systems of jobs act on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetui.engine.checkpoints.store import begin, commit
from finetui.engine.cluster import attempt
from finetui.engine.cluster.attempt import TO_BE_CONTINUED
from finetui.engine.cluster.keep import Keep
from finetui.engine.launcher import start
from finetui.engine.run import Run

FAKE = Path(__file__).parents[1] / "fake_rank.py"


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def asked(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What the attempt asks of finetui. A recipe's name says how its run ends: in a state, with a cause, at once; or
    ``supervised``, with a supervisor and ranks without a model, which go on until they are asked to stop."""
    asked: list[tuple[str, ...]] = []

    def finetui(*words: str) -> Any:
        asked.append(words)
        code = 2 if words[1] == "refused" else 0
        if words[0] == "run" and code == 0:
            made = make_run(name=words[words.index("--name") + 1])
            if words[1] == "supervised":
                start(made, worker=(str(FAKE), "endless"))
            else:
                state, _, cause = words[1].partition("-")
                made.update(state=state, cause=cause or None)
        elif words[0] == "resume":
            Run(words[1]).update(state="finished", cause=None)
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])

    monkeypatch.setattr(attempt, "_finetui", finetui)
    monkeypatch.setattr(attempt, "POLL_S", 0.05)
    return asked


def carry_out(tmp_path: Path, mode: str = "finished", *more: str) -> int:
    return attempt.main([mode, "--name", "job", "--runs", str(tmp_path / "runs"), *more])


def send(number: signal.Signals, run: Run, before: Callable[[], None] = lambda: None) -> threading.Thread:
    """Send this process a signal once a run is at work."""

    def work() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and b'"type":"step"' not in _events(run):
            time.sleep(0.05)
        before()
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def _events(run: Run) -> bytes:
    return run.events_path.read_bytes() if run.events_path.exists() else b""


def save(run: Run, step: int) -> None:
    partial = begin(run.path / "checkpoints", step)
    (partial / "weights.bin").write_bytes(b"weights")
    commit(partial, step, keep=2)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ``scontrol`` was asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "queue"}\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    return tmp_path / "queue"


def test_a_run_is_started_and_followed_to_its_end(asked: list[tuple[str, ...]], tmp_path: Path) -> None:
    assert carry_out(tmp_path, "finished", "--keep", str(tmp_path / "bucket")) == 0
    assert asked == [
        ("run", "finished", "--name", "job", "--out", str(tmp_path / "runs"), "--detach"),
        ("attach", str(tmp_path / "runs" / "job"), "--plain"),
    ]
    assert Run(tmp_path / "bucket" / "job").recorded.state == "finished"
    # A job that is started once more has nothing left to do.
    assert carry_out(tmp_path) == 0
    assert len(asked) == 2


def test_a_job_that_ends_early_is_saved_and_queued_again(asked: list[Any], tmp_path: Path, queue: Path) -> None:
    run = Run(tmp_path / "runs" / "job")
    sender = send(signal.SIGUSR1, run, before=lambda: save(run, 3))
    assert carry_out(tmp_path, "supervised", "--requeue", "--notice-s", "60") == TO_BE_CONTINUED
    sender.join()
    assert (run.status.state, run.status.cause) == ("failed", "preempted")
    assert "a checkpoint was written" in run.status.message
    assert b"in 60 s" in _events(run)
    assert queue.read_text() == "requeue 42\n"
    assert carry_out(tmp_path, "supervised", "--requeue") == 0
    assert [words[0] for words in asked] == ["run", "attach", "resume", "attach"]


@pytest.mark.parametrize(("number", "told"), [(signal.SIGUSR1, "60"), (signal.SIGTERM, ""), (signal.SIGINT, "")])
def test_a_notice_reaches_the_run_at_once(number: int, told: str, make_run: Callable[..., Run]) -> None:
    run, notice = make_run(name="job"), attempt.Notice(60.0)
    file = run.path / "control" / "preempted"
    os.kill(os.getpid(), number)
    assert not file.exists()  # there is nobody to tell yet
    notice.to(run)
    assert file.read_text() == told
    file.unlink()
    os.kill(os.getpid(), number)
    assert file.read_text() == told
    assert notice.by_clock == (number == signal.SIGUSR1)


@pytest.mark.parametrize(("number", "progress", "code"), [(signal.SIGTERM, True, 75), (signal.SIGUSR1, False, 1)])
def test_not_every_job_is_queued_again(
    number: signal.Signals, progress: bool, code: int, asked: list[Any], tmp_path: Path, queue: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What ends a job by force does not want it back; and one that came no further this time would not next time."""
    run, real = Run(tmp_path / "runs" / "job"), attempt._follow

    def follow(*arguments: Any) -> int:
        os.kill(os.getpid(), number)
        if progress:
            save(run, 3)
        return real(*arguments)

    monkeypatch.setattr(attempt, "_follow", follow)
    assert carry_out(tmp_path, "failed-preempted", "--requeue") == code
    assert not queue.exists()


@pytest.mark.parametrize(
    ("mode", "code"), [("failed-oom", 1), ("failed-cost", 1), ("failed-data", 2), ("stopped", 1), ("refused", 2)]
)
def test_failures_are_told_by_the_exit_code(mode: str, code: int, asked: list[Any], tmp_path: Path) -> None:
    assert carry_out(tmp_path, mode) == code


def test_a_signal_before_the_start_starts_nothing(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = attempt._begin

    def begin_late(*arguments: Any) -> int | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(attempt, "_begin", begin_late)
    assert carry_out(tmp_path) == TO_BE_CONTINUED
    assert asked == []


def test_a_run_of_a_machine_that_is_gone_comes_back_from_its_copy(
    asked: list[Any], make_run: Callable[..., Run], tmp_path: Path
) -> None:
    gone = make_run(name="job")
    gone.update(state="running", attempt=1, host="a machine that is gone", started=time.time())
    Keep(gone.path.parent, "job", tmp_path / "bucket").copy()
    runs = tmp_path / "another machine"
    assert attempt.main(["any", "--name", "job", "--runs", str(runs), "--keep", str(tmp_path / "bucket")]) == 0
    assert [words[0] for words in asked] == ["resume", "attach"]
    assert Run(tmp_path / "bucket" / "job").recorded.state == "finished"


def test_a_run_at_work_elsewhere_is_waited_for(
    asked: list[Any], make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a node has failed, nobody knows at once whether its run has: its events must be silent for long."""
    run = make_run(name="job")
    run.update(state="running", attempt=1, host="a node that failed", started=time.time())
    looked: list[float] = []

    def sleep(seconds: float) -> None:
        looked.append(seconds)
        run.update(state="stopped")

    monkeypatch.setattr(attempt, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    assert carry_out(tmp_path) == 0
    assert looked == [attempt.POLL_S]
    assert [words[0] for words in asked] == ["resume", "attach"]


def test_a_copy_that_can_not_be_written_is_no_success(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "bucket").write_text("a file where a folder should be")
    assert carry_out(tmp_path, "finished", "--keep", str(tmp_path / "bucket")) == 1


def test_it_needs_no_torch() -> None:
    code = "import sys, finetui.engine.cluster.attempt; print('torch' in sys.modules, 'textual' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
