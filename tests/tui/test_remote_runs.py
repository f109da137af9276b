"""``--host``: the verbs and the app on the runs of another machine, which an ssh on PATH plays on this one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetui.engine.events import EventLog, Step
from finetui.engine.remote.machine import Host
from finetui.engine.run import Run
from finetui.planner.errors import RunError
from finetui.tui.app import FinetuiApp
from finetui.tui.cli import VERBS
from finetui.tui.remote import RemoteRuns
from finetui.tui.verbs import build
from finetui.tui.widgets.line_chart import LineChart
from finetui.tui.widgets.run_header import RunHeader

SSH = Path(__file__).parents[1] / "engine" / "remote" / "fake_ssh.sh"
Settle = Callable[[Any], Awaitable[None]]


@pytest.fixture
def box(tmp_path: Path, fleet: list[Run], monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The other machine: its home folder holds the fleet, this one's none."""
    (tmp_path / "bin").mkdir()
    shutil.copy(SSH, tmp_path / "bin" / "ssh")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "far").mkdir()
    shutil.move(tmp_path / "runs", tmp_path / "far" / "runs")
    shutil.rmtree(tmp_path / "state")
    monkeypatch.setenv("FAKE_SSH_HOME", str(tmp_path / "far"))
    monkeypatch.chdir(tmp_path)
    return [Run(tmp_path / "far" / "runs" / run.name) for run in fleet]


def verb(*words: str) -> str:
    result = CliRunner().invoke(build({words[0]: VERBS[words[0]]}), list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_verbs(box: list[Run]) -> None:
    rows = json.loads(verb("runs", "--host", "ada@box", "--json"))
    assert [row["name"] for row in rows] == [run.name for run in box]
    assert rows[0]["path"] == f"ada@box:{box[0].path}"
    assert (rows[0]["step"], rows[0]["state"], rows[0]["best_eval_loss"]) == (
        240,
        "running",
        pytest.approx(1.3492, abs=1e-4),
    )
    names = [box[0].name, box[3].name]
    tree = json.loads(verb("compare", *names, "--host", "ada@box", "--json"))
    assert [row["name"] for row in tree["runs"]] == names
    events = verb("attach", box[3].name, "--host", "ada@box", "--json").splitlines()
    assert len(events) == len(box[3].events_path.read_text().splitlines())
    assert "step 412" in verb("logs", box[1].name, "--host", "ada@box", "--events", "-n", "40")
    with pytest.raises(RunError, match="no run 'nobody'"):
        verb("attach", "nobody", "--host", "ada@box", "--plain")


def test_a_run_there_is_asked_to_stop(box: list[Run]) -> None:
    tree = json.loads(verb("stop", box[0].name, "--no-wait", "--host", "ada@box", "--json"))
    assert tree == {"run": box[0].name, "state": "running"}
    assert box[0].requested("stop")
    with pytest.raises(RunError, match="is not its supervisor"):
        verb("stop", box[0].name, "--kill", "--host", "ada@box")  # its process is this test


def test_the_gpus_there(box: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'echo "0, NVIDIA H100 80GB HBM3, 62669, 81559, 97, 642.31, 67, 1755"\n'
        'echo "1, NVIDIA H100 80GB HBM3, [N/A], 81559, [Not Supported], [N/A], 41, 345"\n'
    )
    smi.chmod(0o755)
    tree = json.loads(verb("top", "--host", "ada@box", "--json"))
    first, second = tree["gpus"]
    assert (first["name"], first["sm_percent"], first["power_w"]) == ("NVIDIA H100 80GB HBM3", 97.0, 642.31)
    assert first["memory_used_gib"] == pytest.approx(61.2, abs=0.01)
    assert first["runs"] == [box[0].name]  # the one that is at work
    assert (second["memory_used_gib"], second["sm_percent"], second["temperature_c"]) == (None, None, 41.0)
    assert tree["host"]["memory_total_gib"] > 0
    assert tree["warnings"] == []
    assert "61.2/79.6 GiB" in verb("top", "--host", "ada@box", "--once")
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    tree = json.loads(verb("top", "--host", "ada@box", "--json"))
    assert tree["warnings"] == ["GPUs of ada@box can't be watched: NVIDIA-SMI has failed."]
    with pytest.raises(RunError, match="Could not resolve hostname"):
        verb("top", "--host", "nowhere", "--once")


async def test_the_app(box: list[Run], settle: Settle) -> None:
    remote = RemoteRuns(Host("ada@box"))
    app = FinetuiApp("monitor", None, backend=remote.backend())
    try:
        async with app.run_test(size=(100, 30)) as pilot:
            for _ in range(100):
                await settle(pilot)
                if "240/412" in app.screen.query_one(RunHeader).text:
                    break
            with EventLog(box[0].events_path) as log:
                log.append(Step(241, 0.6, 0.9876, 1e-4, 0.4, 1, 5000.0, 3.2, 412))
            for _ in range(100):
                await pilot.pause(0.1)
                if "241/412" in app.screen.query_one(RunHeader).text:
                    break
            assert "loss 0.9876" in app.screen.query_one("#loss", LineChart).text
            await pilot.press("w")
            for _ in range(100):
                await pilot.pause(0.1)
                if box[0].requested("checkpoint"):
                    break
            assert box[0].requested("checkpoint")
            with pytest.raises(RunError, match="the runs here are those of ada@box"):
                app.backend.delete(box[0])
    finally:
        remote.close()
