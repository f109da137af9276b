"""Ranks that hang, are stopped or only work slowly: told apart, and what is done about each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetui.engine import supervisor
from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.supervision.hang import Watch, hang_limit_s, is_stopped
from finetui.engine.supervision.heartbeat import VARIABLE, Beat, Hearts, Pulse
from finetui.engine.supervision.outcome import Outcome
from finetui.engine.supervisor import supervise
from finetui.planner.recipe import Recipe

FAKE = Path(__file__).parents[1] / "fake_rank.py"
#: Does what each line says ("idle", "compute" or "write"), and says when it is done.
RANK = """
import sys, time
for line in sys.stdin:
    if line == "compute\\n":
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
    elif line == "write\\n":
        with open(sys.argv[1], "wb") as file:
            file.write(bytes(1 << 20))
    print("done", flush=True)
"""


class Rank:
    """A process that works for a moment when it is told to, however busy the machine is."""

    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-c", RANK, str(file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.do("idle")

    def do(self, what: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    made = Rank(tmp_path / "file")
    yield made
    made.process.kill()
    made.process.communicate()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_beats_cross_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with Hearts(2) as hearts:
        assert hearts.read() == [Beat(), Beat()]
        code = (
            "from finetui.engine.supervision.heartbeat import *; p = Pulse(1); p.beat(); p.beat(7); print(os.getpid())"
        )
        environment = {**os.environ, VARIABLE: hearts.path}
        told = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, check=True)
        assert hearts.read() == [Beat(), Beat(int(told.stdout), 3, 7, True)]
        monkeypatch.setenv(VARIABLE, hearts.path)
        pulse = Pulse(0)
        pulse.beat(9)
        pulse.rest()
        assert hearts.read()[0] == Beat(os.getpid(), 3, 9, False)
        with pytest.raises(Exception, match=r"pack_into|buffer"):
            Pulse(2).beat()
        hearts.clear()
        assert hearts.read() == [Beat(), Beat()]
    Pulse(0).beat(1)  # the memory is gone: beats go nowhere


def test_a_rank_is_silent_from_its_last_beat_on_and_the_first_one_to_fall_silent_leads(rank: Rank) -> None:
    pid, clock = rank.pid, Clock()
    beats = [Beat(pid, 1), Beat(pid, 1, 4, True), Beat()]
    watch = Watch(lambda: list(beats), 10.0, clock)
    for second in range(25):
        clock.now += 1
        if second < 10:
            beats[0] = Beat(pid, second + 2, 5, True)
        silent = watch.look()
        assert bool(silent) == (second >= 10), second  # the first look only sets the point to count from
    assert [(one.rank, one.step) for one in silent] == [(1, 4), (0, 5)]
    assert str(silent[0]) == "rank 1 has not moved for 24 s after step 4"
    watch.forgive()
    clock.now += 1
    assert not watch.look()


def test_nobody_hangs_while_the_supervisor_itself_did_not_run() -> None:
    clock = Clock()
    watch = Watch(lambda: [Beat(os.getpid(), 1, 1, True)], 60.0, clock)
    for _ in range(3):
        clock.now += 3600  # the machine slept, or all of it was stopped
        assert not watch.look()


def test_without_a_limit_nothing_is_looked_at() -> None:
    def read() -> list[Beat]:
        raise AssertionError("looked")

    assert Watch(read, None).look() == []


@pytest.mark.parametrize(
    ("mode", "training", "hangs"),
    [("idle", False, True), ("compute", False, False), ("compute", True, True), ("write", True, False)],
)
def test_work_without_a_beat(rank: Rank, mode: str, training: bool, hangs: bool) -> None:
    """Writing a file is work at any time; computing only before the first step, since a rank in NCCL spins."""
    clock, found = Clock(), False
    watch = Watch(lambda: [Beat(rank.pid, 1, 0, training)], 8.0, clock)
    for _ in range(14):
        rank.do(mode)
        clock.now += 1
        found = found or bool(watch.look())
    assert found == hangs


def test_a_stopped_process_is_known_as_such(rank: Rank) -> None:
    pid, clock = rank.pid, Clock()
    assert not is_stopped(pid)
    os.kill(pid, signal.SIGSTOP)
    watch = Watch(lambda: [Beat(pid, 1, 2, True)], 4.0, clock)
    for _ in range(6):
        clock.now += 1
        silent = watch.look()
    assert silent[0].stopped
    assert "SIGSTOP" in str(silent[0])


def carry_out(run: Run, mode: str) -> Outcome:
    return supervise(run, worker=(str(FAKE), mode))


def warnings(run: Run) -> list[str]:
    return [event.data["what"] for event in read_events(run.events_path) if event.type == "warning"]


@pytest.mark.parametrize("gpus", [[0], pytest.param([0, 1], marks=[pytest.mark.faults, pytest.mark.slow])])
def test_a_hang_leaves_its_stacks_and_the_run_goes_on(make_run: Callable[..., Run], gpus: list[int]) -> None:
    run = make_run({"limits": {"hang_s": 3.0}}, gpus=gpus)
    assert carry_out(run, "hang-once") == Outcome("finished")
    assert run.recorded.attempt == 2
    guilty = len(gpus) - 1
    assert f"rank {guilty} has not moved" in warnings(run)[0]
    assert "training goes on from the beginning" in warnings(run)[0]
    assert "hang_here" in run.log_path(guilty).read_text()
    assert all("most recent call first" in run.log_path(rank).read_text() for rank in range(len(gpus)))
    states = [event.data["state"] for event in read_events(run.events_path) if event.type == "state"]
    assert states == ["preparing", "running", "preparing", "running", "finished"]


def test_restarts_have_an_end(make_run: Callable[..., Run]) -> None:
    run = make_run({"limits": {"hang_s": 3.0, "restarts": 1}})
    outcome = carry_out(run, "hang")
    assert (outcome.state, outcome.cause) == ("failed", "hang")
    assert "rank 0 has not moved" in outcome.message
    assert "finetui resume" in outcome.do
    assert run.recorded.attempt == 2
    assert not run.requested("stop")


def test_no_restart_where_none_is_wanted(make_run: Callable[..., Run]) -> None:
    run = make_run({"limits": {"restarts": 0}})
    assert carry_out(run, "killed").cause == "crash"
    assert run.recorded.attempt == 1


def test_a_killed_rank_is_started_again(make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert carry_out(run, "killed-once") == Outcome("finished")
    assert run.recorded.attempt == 2
    assert "SIGKILL" in warnings(run)[0]


def test_what_would_only_happen_again_is_not_tried_again(make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert carry_out(run, "silent-crash").cause == "crash"
    assert run.recorded.attempt == 1


def test_a_stopped_rank_is_woken_up(make_run: Callable[..., Run]) -> None:
    import threading

    run = make_run({"limits": {"hang_s": 3.0}})

    def stop_it() -> None:
        while not any(event.type == "step" for event in read_events(run.events_path)):
            time.sleep(0.02)
        os.kill(int((run.path / "pid0").read_text()), signal.SIGSTOP)

    threading.Thread(target=stop_it, daemon=True).start()
    assert carry_out(run, "finish") == Outcome("finished")
    assert run.recorded.attempt == 1
    assert "stopped by a signal" in warnings(run)[0]


def test_a_rank_that_waits_for_rewards_does_not_hang() -> None:
    plain = Recipe.build({"model": "m", "limits": {"hang_s": 60.0}})
    assert hang_limit_s(plain) == 60.0
    judged = {"method": "grpo", "rewards": [{"function": "exact-answer", "timeout_s": 100.0}]}
    assert hang_limit_s(Recipe.build({"model": "m", "limits": {"hang_s": 60.0}, **judged})) == 160.0
    assert hang_limit_s(Recipe.build({"model": "m", "limits": {"hang_s": None}, **judged})) is None


def test_a_rank_that_nothing_can_end_does_not_keep_the_supervisor(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waits in the kernel, as for a dead network drive, outlives SIGKILL."""
    run = make_run({"limits": {"hang_s": 3.0}})
    monkeypatch.setattr(supervisor, "KILL_S", 0.5)
    monkeypatch.setattr(supervisor, "end_ranks", lambda **_: None)
    outcome = carry_out(run, "hang")
    os.kill(int((run.path / "pid0").read_text()), signal.SIGKILL)
    assert (outcome.state, outcome.cause) == ("failed", "hang")
    assert "do not end" in outcome.message
    assert run.recorded.attempt == 1
