"""Jobs carried out for real: the scripts train the shipped tiny model, are cut short, are started again, and come to
the very losses of a run that nobody disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import finetui
from finetui.engine.cluster import skypilot, slurm
from finetui.engine.cluster.attempt import TO_BE_CONTINUED
from finetui.engine.cluster.job import Ask, Job, make_job
from finetui.engine.events import read_events
from finetui.engine.launcher import import_environment
from finetui.planner.recipe import Recipe

PACKAGE = Path(finetui.__file__).parent
pytestmark = pytest.mark.slow


def tiny_job(system: str, name: str) -> Job:
    recipe = Recipe.load(PACKAGE / "presets" / "quickstart.yaml", {"max_steps": 48, "checkpoint.every": 4})
    recipe = recipe.with_overrides({"hardware.device": "cpu", "limits.hours": 1, "data.1.limit": 16})
    return make_job(recipe, Ask(system, name=name, bucket=None), has_token=False)  # type: ignore[arg-type]


@pytest.fixture
def carry_out(tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """Runs a script as the batch shell of a job; what it says goes to ``log``."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "queue"}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)

    def run(script: str) -> subprocess.Popen[bytes]:
        file = tmp_path / "job"
        file.write_text(script)
        environment = {**os.environ, **import_environment(), "HOME": str(tmp_path), "FINETUI_PYTHON": sys.executable}
        environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment |= {"SLURM_JOB_ID": "42", "SLURM_SUBMIT_DIR": str(tmp_path)}
        environment.pop("FINETUI_RUNS")
        with open(tmp_path / "log", "ab") as log:
            return subprocess.Popen(["bash", file], env=environment, cwd=tmp_path, stdout=log, stderr=log)

    return run


def losses(run: Path) -> dict[int, tuple[float, float]]:
    steps = [event.data for event in read_events(run / "events.jsonl") if event.type == "step"]
    return {step["step"]: (step["loss"], step["grad_norm"]) for step in steps}


def cut_short(job: subprocess.Popen[bytes], run: Path, number: signal.Signals) -> int:
    """Send the batch shell a signal once its run has made some steps; the exit code of the job."""
    until = time.monotonic() + 300
    while time.monotonic() < until and job.poll() is None:
        if (run / "events.jsonl").exists() and len(losses(run)) >= 5:
            job.send_signal(number)
            return job.wait(300)
        time.sleep(0.05)
    return job.wait(300)


def test_jobs_that_are_cut_short_come_to_the_same_losses(
    carry_out: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    assert carry_out(slurm.write(tiny_job("slurm", "whole"), tmp_path, "job").text).wait(400) == 0
    whole = losses(runs / "whole")
    assert sorted(whole) == list(range(1, 49))

    # Slurm's clock runs out: the run is saved, the job queued again, and the same script goes on.
    script = slurm.write(tiny_job("slurm", "timed"), tmp_path, "job").text
    assert cut_short(carry_out(script), runs / "timed", signal.SIGUSR1) == TO_BE_CONTINUED, (
        tmp_path / "log"
    ).read_text()
    assert (tmp_path / "queue").read_text() == "requeue 42\n"
    before = losses(runs / "timed")
    assert 5 <= max(before) < 48
    assert carry_out(script).wait(400) == 0
    assert losses(runs / "timed") == whole

    # A spot machine is taken away with all that was on it: the run comes back from the bucket.
    task = yaml.safe_load(skypilot.write(tiny_job("skypilot", "spot"), tmp_path, "job").text)
    home = tmp_path / "finetui"
    for remote, local in task["file_mounts"].items():
        target = tmp_path / remote.removeprefix("~/")
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if Path(local).is_dir() else shutil.copyfile)(local, target)
    python = home / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    script = task["run"].replace("--runs runs", f"--runs runs --keep {tmp_path / 'bucket'}")
    assert cut_short(carry_out(script), home / "runs" / "spot", signal.SIGTERM) == TO_BE_CONTINUED
    shutil.rmtree(home / "runs")
    assert carry_out(script).wait(400) == 0
    assert losses(home / "runs" / "spot") == whole
    assert losses(tmp_path / "bucket" / "spot") == whole
    result = tmp_path / "bucket" / "spot" / "output" / "model.safetensors"
    assert result.read_bytes() == (runs / "whole" / "output" / "model.safetensors").read_bytes()
