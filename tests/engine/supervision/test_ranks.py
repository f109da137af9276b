"""Workers as processes: two ranks train like one, and a run that is killed goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import finetui
from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.worker import attempt

MakeRun = Callable[..., Run]


def environment(**more: str) -> dict[str, str]:
    """Of a child that can import finetui and computes with one thread, as the tests do in process."""
    above = str(Path(finetui.__file__).parent.parent)
    path = os.pathsep.join([above, *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def steps(run: Run) -> list[dict[str, Any]]:
    return [event.data for event in read_events(run.events_path) if event.type == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_two_ranks_train_like_one(training_run: MakeRun, tuning: str) -> None:
    one = training_run(tuning=tuning, steps=4, micro_batch=2, accumulation=4)
    two = training_run(tuning=tuning, steps=4, micro_batch=2, accumulation=2, gpus=[0, 1], strategy="ddp")
    assert attempt(one) == 0
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "finetui.engine.worker", str(two.path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr + two.log_path(0).read_text()
    expected, found = steps(one), steps(two)
    for key in ("loss", "grad_norm"):
        assert [s[key] for s in found] == pytest.approx([s[key] for s in expected], rel=3e-6)
    assert [s["tokens"] for s in found] == [s["tokens"] for s in expected]
    held_out = [[e.data["loss"] for e in read_events(r.events_path) if e.type == "eval"] for r in (one, two)]
    assert held_out[1] == pytest.approx(held_out[0], rel=3e-6)
    ranks = {e.data["rank"] for e in read_events(two.events_path) if e.type == "memory"}
    assert ranks == {0, 1}
    saved = {path.name for path in (two.path / "checkpoints" / "step-000004").iterdir()}
    assert {"rank0.safetensors", "rank1.safetensors"} <= saved


@pytest.mark.slow
def test_kill_and_resume_give_the_losses_of_an_uninterrupted_run(training_run: MakeRun) -> None:
    whole, killed = training_run(steps=40), training_run(steps=40)
    assert attempt(whole) == 0
    command = [sys.executable, "-P", "-m", "finetui.engine.worker", str(killed.path)]
    with subprocess.Popen(command, env=environment()) as worker:
        deadline = time.monotonic() + 120
        while len(steps(killed)) < 7 and time.monotonic() < deadline and worker.poll() is None:
            time.sleep(0.005)
        worker.send_signal(signal.SIGKILL)
    assert 7 <= len(steps(killed)) < 40
    assert attempt(killed) == 0
    assert {s["step"]: s["loss"] for s in steps(killed)} == {s["step"]: s["loss"] for s in steps(whole)}


@pytest.mark.slow
def test_a_worker_dies_with_its_parent(training_run: MakeRun) -> None:
    run = training_run(steps=10_000, recipe={"checkpoint": {"every": 9000}, "evaluation": {"every": 9000}})
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-P', '-m', 'finetui.engine.worker', {str(run.path)!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], env=environment(), stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + 120
        while not steps(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert steps(run), run.log_path(0).read_text()
        parent.kill()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not _lives(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("asked_to_stop", [True, False])
def test_sigterm_waits_for_the_checkpoint_that_a_preempted_machine_asks_for(
    training_run: MakeRun, asked_to_stop: bool
) -> None:
    run = training_run(steps=2000, checkpoint_every=2000, eval_every=2000)
    command = [sys.executable, "-P", "-m", "finetui.engine.worker", str(run.path)]
    worker = subprocess.Popen(command, env=environment())
    end = time.monotonic() + 120
    while not steps(run):
        assert time.monotonic() < end, run.log_path(0).read_text()
        time.sleep(0.1)
    if asked_to_stop:
        run.request("stop")
    worker.send_signal(signal.SIGTERM)
    code = worker.wait(timeout=60)
    if asked_to_stop:
        assert code == 0
        assert list((run.path / "checkpoints").glob("step-*"))
    else:
        assert code == 128 + signal.SIGTERM
