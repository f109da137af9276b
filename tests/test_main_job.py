"""The main job as its user does it: start in a terminal, close it, come back, watch, use what was made."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("torch")

import finetui
from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.status import LIVE_STATES

FINETUI = [sys.executable, "-P", "-m", "finetui"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    above = str(Path(finetui.__file__).parent.parent)
    home = tmp_path_factory.mktemp("home")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([above, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "FINETUI_RUNS": str(home / "runs"),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TERM": "xterm-256color",
    }


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(environment: dict[str, str], tmp_path: Path) -> Cli:
    def call(*words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FINETUI, *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call


def short(name: str, steps: int) -> list[str]:
    """The quickstart, cut short."""
    settings = [f"max_steps={steps}", "evaluation.every=1000", "checkpoint.every=4", "data.0.limit=200"]
    return ["run", "quickstart", "--name", name, *[word for s in settings for word in ("--set", s)]]


def wait_for(what: Callable[[], Any], seconds: float = 180) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def steps_of(run: Run) -> dict[int, float]:
    """Loss by step; a step that was done again after a resume counts as it was done last."""
    return {e.data["step"]: e.data["loss"] for e in read_events(run.events_path) if e.type == "step"}


def test_a_run_outlives_its_terminal_and_two_viewers_see_it_from_the_start(
    cli: Cli, environment: dict[str, str], tmp_path: Path
) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [*FINETUI, *short("closed", 12)], environment)
    path = Path(environment["FINETUI_RUNS"]) / "closed"
    wait_for(lambda: (path / "run.json").exists() and Run(path).recorded.pid)
    time.sleep(0.5)
    os.close(terminal)  # the terminal is gone: the foreground process gets SIGHUP
    os.waitpid(pid, 0)
    run = Run(path)
    assert run.status.state in LIVE_STATES

    viewers = [
        subprocess.Popen([*FINETUI, "attach", "closed", "--plain"], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    seen = [viewer.communicate(timeout=240)[0] for viewer in viewers]
    assert [viewer.returncode for viewer in viewers] == [0, 0]
    assert seen[0] == seen[1]
    assert "step 1 " in seen[0]
    assert "step 12 " in seen[0]
    assert run.status.state == "finished"
    assert [e.seq for e in read_events(run.events_path)] == list(range(1, len(read_events(run.events_path)) + 1))

    answer = cli("chat", "closed", "--prompt", "What is a checkpoint?", "--base", "--max-new-tokens", "8", "--json")
    assert answer.returncode == 0, answer.stderr
    assert set(json.loads(answer.stdout)) == {"prompt", "tuned", "base"}
    exported = cli("export", "closed", "--to", "merged", "--out", str(tmp_path / "model"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "model" / "config.json").is_file()
    assert any((tmp_path / "model").glob("*.safetensors"))


def test_kill_9_then_resume_gives_the_losses_of_an_uninterrupted_run(cli: Cli, environment: dict[str, str]) -> None:
    whole = cli(*short("whole", 12))
    assert whole.returncode == 0, whole.stderr
    assert cli(*short("killed", 12), "--detach").returncode == 0
    root = Path(environment["FINETUI_RUNS"])
    killed = Run(root / "killed")
    wait_for(lambda: any(e.type == "checkpoint" for e in read_events(killed.events_path)))
    supervisor = psutil.Process(killed.recorded.pid)
    for process in [supervisor, *supervisor.children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: killed.status.state == "lost", 20)
    assert "finetui resume killed" in killed.status.do
    resumed = cli("resume", "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert killed.status.state == "finished"
    assert steps_of(killed) == steps_of(Run(root / "whole"))


def test_stop_writes_a_checkpoint_and_the_run_can_go_on(cli: Cli, environment: dict[str, str]) -> None:
    assert cli(*short("halted", 40), "--detach").returncode == 0
    run = Run(Path(environment["FINETUI_RUNS"]) / "halted")
    wait_for(lambda: steps_of(run))
    stopped = cli("stop", "halted", "--json")
    assert json.loads(stopped.stdout) == {"run": "halted", "state": "stopped"}
    last = max(steps_of(run))
    assert last < 40
    assert (run.path / "checkpoints" / f"step-{last:06d}" / "manifest.json").is_file()
    listed = json.loads(cli("runs", "--json").stdout)
    assert next(row for row in listed if row["name"] == "halted")["state"] == "stopped"
