"""``compare`` and ``top``: what the command line says of runs and of this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from finetui.engine.events import GpuSample, HostSample, Warn
from finetui.engine.run import Run
from finetui.tui.columns import table
from finetui.tui.commands import top as top_verb
from finetui.tui.commands.runs import _COLUMNS, _words
from finetui.tui.commands.top import Lately, Machine, picture
from finetui.tui.run_table import RunScanner
from finetui.tui.verbs import build

NOW = 1772366400.0


def run_verb(*words: str) -> str:
    result = CliRunner().invoke(build({words[0]: words[0]}), list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_compare_prints_and_answers_in_json(fleet: list[Run]) -> None:
    paths = [str(run.path) for run in (fleet[0], fleet[3])]
    text = run_verb("compare", *paths)
    assert all(run.name in text for run in (fleet[0], fleet[3]))
    assert "held-out, best" in text
    tree = json.loads(run_verb("compare", *paths, "--json"))
    assert [row["name"] for row in tree["runs"]] == [fleet[0].name, fleet[3].name]
    assert tree["runs"][0]["held_out"] == pytest.approx(1.3492, abs=1e-3)
    assert tree["settings"] == {}


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_list_of_runs_cuts_names_alone(fleet: list[Run], width: int) -> None:
    rows = [_words(row) for row in RunScanner(lambda: fleet, lambda: NOW).scan()]
    rows[0] = {**rows[0], "run": "a-run-of-a-very-long-name-" * 3}
    lines = table(_COLUMNS, rows, width)
    assert all(len(line) <= width for line in lines)
    assert lines[1].split()[:2] == ["●", "running"]
    assert "240/412" in lines[1]
    assert all(figure in lines[3] for figure in ("✘ failed (oom)", "3/412", "2.4446"))
    assert ("cost" in lines[0]) == (width == 140)


class FakeGpus:
    """Two GPUs, one of which is lost; its trouble is told once."""

    def __init__(self) -> None:
        self.told = [Warn("GPU 1 does not answer", do="Restart the machine.")]

    def sample(self) -> list[GpuSample]:
        good = GpuSample(
            0, "NVIDIA H100", 40.0, 80.0, 97.0, 642.0, 67.0, 1755.0, ["power cap"], nvlink_in_gb_s=212.0,
            nvlink_out_gb_s=208.0,
        )  # fmt: skip
        return [good, GpuSample(1, "NVIDIA H100", None, None, None, None, None, None, [])]

    def take_warnings(self) -> list[Warn]:
        told, self.told = self.told, []
        return told


class FakeHost:
    def sample(self) -> HostSample:
        return HostSample(38.0, 41.5, 310.0, 251.5)


def drawn(machine: Machine) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(picture(machine.reading()))
    return console.export_text()


def test_top_names_the_run_on_each_gpu_and_keeps_a_warning(fleet: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_verb, "list_runs", lambda: fleet)
    machine: Any = Machine(FakeGpus(), FakeHost())  # type: ignore[arg-type]
    for _ in range(2):
        text = drawn(machine)
        assert "40.0/80.0 GiB" in text
        assert "██████████░░░░░░░░░░" in text
        assert "power cap" in text
        assert "212/208 GB/s" in text
        assert "PCIe" not in text  # which neither GPU tells
        assert "! GPU 1 does not answer. Restart the machine." in text
        assert "RAM 42/252 GiB" in text
    rows = [line for line in text.splitlines() if "H100" in line]
    assert fleet[0].name in rows[0]
    assert fleet[0].name not in rows[1]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_top_cuts_no_figure(fleet: list[Run], monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(top_verb, "list_runs", lambda: fleet)
    machine: Any = Machine(FakeGpus(), FakeHost())  # type: ignore[arg-type]
    console = Console(width=width, record=True, force_terminal=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(picture(machine.reading()))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for figure in ("40.0/80.0 GiB", "97 %", "642 W", "67 °C"):
        assert figure in text
    assert ("212/208 GB/s" in text) == (width == 200)


def test_top_on_a_machine_without_gpus(tmp_path: Path) -> None:
    tree = json.loads(run_verb("top", "--json"))
    assert set(tree) == {"gpus", "host", "warnings"}
    assert tree["host"]["memory_total_gib"] > 0


def test_runs_by_the_beginning_of_their_names(fleet: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetui.engine.run.list_runs", lambda root=None: fleet)
    tree = json.loads(run_verb("compare", "old", "qwen3-8b-q", "--json"))
    assert [row["name"] for row in tree["runs"]] == ["old-run", fleet[0].name]


def test_the_load_of_the_last_readings_is_a_line_of_blocks() -> None:
    lately = Lately()
    loads: list[float | None] = [0.0, 50.0, 100.0, None]
    for load in loads:
        now = lately.take({"gpus": [{"index": 0, "name": "H100", "runs": [], "sm_percent": load}]})
    assert now["gpus"][0]["lately"] == "▁▅█·"
    assert (
        "lately" not in lately.take({"gpus": [{"index": 1, "name": "H100", "runs": [], "sm_percent": 3.0}]})["gpus"][0]
    )
    for _ in range(50):
        lately.take({"gpus": [{"index": 0, "name": "H100", "runs": [], "sm_percent": 100.0}]})
    kept = lately.take({"gpus": [{"index": 0, "name": "H100", "runs": [], "sm_percent": 0.0}]})
    assert kept["gpus"][0]["lately"] == "█" * 19 + "▁"
    shown = Console(width=120)
    with shown.capture() as capture:
        shown.print(picture({**kept, "host": dataclasses.asdict(HostSample(1.0, 1.0, 1.0, 2.0)), "warnings": []}))
    assert "lately" in capture.get()
    assert "█▁" in capture.get()
