"""The same as in ``test_kill.py`` through the command line alone: processes that nobody forked."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from finetui.engine.run import Run

from .harness import (
    Result,
    environment,
    gone,
    kill_9,
    ranks_of,
    recipe_for,
    require_orderly,
    result_of,
    told,
    wait_until,
)

#: Kills of one run.
KILLS = 3


def finetui(*words: str) -> str:
    """What a command says; it has to go well."""
    command = [sys.executable, "-P", "-m", "finetui", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_run_kill_and_resume_from_a_shell(
    ground: tuple[Path, Path], undisturbed: Callable[..., Result], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for(*ground, max_steps=12)))
    choose = random.Random(3)
    finetui("run", str(recipe), "--detach", "--name", "harmed")
    run = Run(Path(os.environ["FINETUI_RUNS"]) / "harmed")
    for _ in range(KILLS):
        supervisor = psutil.Process(run.recorded.pid)
        begin = len(told(run, "step"))
        wait_until(lambda s=supervisor, b=begin: gone(s) or len(told(run, "step")) > b)
        time.sleep(choose.random() / 2)
        doomed = [supervisor, *ranks_of(supervisor)]
        kill_9(doomed[:1] if choose.random() < 0.5 else doomed)
        wait_until(lambda d=doomed: all(gone(process) for process in d))
        if run.status.state == "finished":
            break
        assert run.status.state == "lost"
        finetui("resume", "harmed", "--detach")
    supervisor = psutil.Process(run.recorded.pid) if psutil.pid_exists(run.recorded.pid) else None
    wait_until(lambda: supervisor is None or gone(supervisor))
    assert run.recorded.state == "finished", run.recorded
    require_orderly(run)
    assert result_of(run) == undisturbed()
