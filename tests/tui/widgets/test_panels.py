"""GPU panel, memory bar, run header and log: no data, a lost GPU, NaN, and widths from nothing to wide."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from finetui.engine.events import Event, GpuSample
from finetui.engine.status import Status
from finetui.planner.recipe import Recipe
from finetui.tui.backend import Backend
from finetui.tui.format import short_name
from finetui.tui.history import History
from finetui.tui.widgets.gpu_panel import GpuPanel, gpu_row
from finetui.tui.widgets.lines import fitted, length, spread, wrapped
from finetui.tui.widgets.log_pane import LogPane
from finetui.tui.widgets.memory_bar import MemoryBar
from finetui.tui.widgets.run_header import RunHeader


def text(lines: list[Any]) -> str:
    return "\n".join("".join(part for part, _ in line).rstrip() for line in lines)


def gpus(sample: Callable[..., GpuSample], count: int, quiet: float = 0.0, **changes: Any) -> list[Any]:
    return [(dataclasses.asdict(sample(index, **changes)), quiet) for index in range(count)]


def test_no_gpu_is_said() -> None:
    panel = GpuPanel()
    assert text(panel.draw(76, 4)) == "no readings yet"
    panel._host = {"cpu_percent": 3.0, "memory_used_gib": 4.0, "disk_free_gib": 9.0}
    assert text(panel.draw(76, 4)) == "no GPU in use"


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 4), (8, 4), (16, 8)])
def test_every_gpu_is_there(gpu_sample: Callable[..., GpuSample], count: int, rows: int) -> None:
    panel = GpuPanel()
    panel._gpus = gpus(gpu_sample, count)
    lines = panel.draw(76, 40)
    assert len(lines) == rows
    assert text(lines).count("67 °C") == count
    assert all(length(line) <= 76 for line in lines)


TRAFFIC: dict[str, Any] = {
    "memory_clock_mhz": 2619.0, "power_limit_w": 700.0, "pcie_in_gb_s": 1.23, "pcie_out_gb_s": 0.4,
    "nvlink_in_gb_s": 212.4, "nvlink_out_gb_s": 8.96, "ecc_corrected": 3, "ecc_uncorrected": 0,
}  # fmt: skip


def test_clocks_traffic_errors_and_what_holds_back(gpu_sample: Callable[..., GpuSample]) -> None:
    panel = GpuPanel()
    panel.detailed = True
    panel._gpus = gpus(gpu_sample, 1, **TRAFFIC, throttle=["power cap", "software thermal"])
    line = text(panel.draw(140, 4))
    for words in ("1755/2619 MHz", "PCIe in/out 1.2/0.4 GB/s", "NVLink 212/9.0 GB/s", "ECC 3 corrected",
                  "! power cap, software thermal", "limit 700 W"):  # fmt: skip
        assert words in line
    panel._gpus = gpus(gpu_sample, 8, **{**TRAFFIC, "ecc_uncorrected": 2})
    lines = text(panel.draw(140, 40))
    assert lines.count("1755 MHz P1.2/0.4 N212/9.0 E2") == 8
    panel._gpus = gpus(gpu_sample, 1, **{**TRAFFIC, "ecc_uncorrected": 2})
    assert "✘ 2 memory errors" in text(panel.draw(140, 4))


def test_a_gpu_without_traffic_shows_its_clock_alone(gpu_sample: Callable[..., GpuSample]) -> None:
    panel = GpuPanel()
    panel.detailed = True
    panel._gpus = gpus(gpu_sample, 1)
    assert text(panel.draw(76, 4)).strip() == "0 1755 MHz"
    panel._gpus = gpus(gpu_sample, 1, memory_used_gib=None, sm_percent=None, power_w=None)
    assert "gives no reading" in text(panel.draw(76, 4))


@pytest.mark.parametrize("width", [1, 5, 20, 33, 76, 200])
@pytest.mark.parametrize("count", [1, 3, 8, 17])
def test_details_fit_any_width(gpu_sample: Callable[..., GpuSample], width: int, count: int) -> None:
    panel = GpuPanel()
    panel.detailed = True
    panel._gpus = gpus(gpu_sample, count, **TRAFFIC, throttle=["hardware thermal"])
    assert all(length(line) <= width for line in panel.draw(width, 40))


def test_a_lost_gpu_is_said_in_words(gpu_sample: Callable[..., GpuSample]) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("memory_used_gib", "memory_total_gib", "sm_percent", "power_w", "temperature_c", "sm_clock_mhz")
    )
    panel = GpuPanel()
    panel._gpus = gpus(gpu_sample, 1, **nothing)
    assert "gives no reading" in text(panel.draw(76, 4))
    panel._gpus = gpus(gpu_sample, 2, quiet=42.0)
    assert text(panel.draw(76, 4)).count("no reading for 42 s") == 2
    panel._gpus = gpus(gpu_sample, 8, quiet=42.0)
    assert text(panel.draw(76, 4)).count("✘ no reading") == 8


def test_figures_that_the_driver_does_not_give(gpu_sample: Callable[..., GpuSample]) -> None:
    row = gpu_row(dataclasses.asdict(gpu_sample(0, power_w=None, temperature_c=None)), 0.0, 76)
    assert "–" in text([row])
    assert "97 %" in text([row])


def test_what_holds_a_gpu_back_is_said(gpu_sample: Callable[..., GpuSample]) -> None:
    row = gpu_row(dataclasses.asdict(gpu_sample(0, throttle=["power cap"])), 0.0, 90)
    assert "! power cap" in text([row])


def test_short_names() -> None:
    assert short_name("NVIDIA H100 80GB HBM3") == "H100 80GB"
    assert short_name("NVIDIA GeForce RTX 4090") == "RTX 4090"
    assert short_name("NVIDIA") == "NVIDIA"


@pytest.mark.parametrize("width", [0, 5, 12, 20, 36, 76, 200])
def test_the_memory_bar_at_any_width(width: int, backend: Backend) -> None:
    bar = MemoryBar()
    bar._plan = backend.plan(Recipe.build({"model": "a/b", "tuning": "full", "hardware": {"gpu": "T4"}}))
    assert all(length(line) <= max(width, 24) for line in bar.draw(width, 20))
    assert width < 14 or "✘ does not fit" in text(bar.draw(width, 20))


def test_a_header_without_a_plan_and_without_steps() -> None:
    header = RunHeader()
    assert header.draw(80, 4) == []
    header._run_name = "a-run"
    assert "preparing" in text(header.draw(80, 4))
    header._status = Status(state="failed", cause="nan", message="m" * 300, do="lower the learning rate")
    shown = text(header.draw(80, 10))
    assert "failed: nan" in shown
    assert "Try: lower the learning rate" in shown
    assert all(length(line) <= 80 for line in header.draw(80, 10))


def test_a_warning_is_not_pushed_out_by_steps() -> None:
    history = History()
    history.apply(Event(1, 0.0, "warning", {"what": "GPU 3 is lost", "do": ""}))
    for number in range(2, 300):
        history.apply(Event(number, float(number), "step", {"step": number, "loss": math.nan}))
    pane = LogPane()
    pane._history = history
    shown = text(pane.draw(76, 4))
    assert "GPU 3 is lost" in shown
    assert "step 299" in shown
    assert len(pane.draw(76, 4)) == 4


@pytest.mark.parametrize("view", ["log", "answers", "plan"])
@pytest.mark.parametrize("width", [1, 10, 76])
def test_every_view_without_anything(view: str, width: int) -> None:
    pane = LogPane()
    pane.view = view
    assert isinstance(pane.draw(width, 4), list)


def test_lines_are_cut_spread_and_wrapped() -> None:
    assert text([fitted([("abcdef", "")], 4)]) == "abc…"
    assert text([spread([("left", "")], [("right", "")], 12)]) == "left   right"
    assert all(length(line) <= 18 for line in wrapped("word " * 20 + "x" * 50, 18, indent="  "))
    assert text(wrapped("  kept", 10)) == "  kept"


@pytest.mark.parametrize(("width", "rows"), [(56, 4), (58, 4), (76, 4), (96, 4), (196, 2)])
def test_eight_gpus_take_four_lines_at_most_and_no_figure_is_cut(gpu_sample: Any, width: int, rows: int) -> None:
    panel = GpuPanel()
    panel._gpus = gpus(gpu_sample, 8, memory_used_gib=125.0, memory_total_gib=140.0, sm_percent=100.0)
    lines = text(panel.draw(width, 8)).splitlines()
    assert len(lines) == rows
    assert max(len(line) for line in lines) <= width
    said = "".join(lines).replace(" ", "")
    assert [said.count(figure) for figure in ("125/140G", "100%", "W", "67°C", "…")] == [8, 8, 8, 8, 0]


def test_of_the_progress_line_the_time_so_far_gives_way_first(training: Any, now: float) -> None:
    backend, history = Backend(), History()
    plan = backend.plan(Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "qlora", "hardware": {"gpu": "H100"}}))
    for seq, (when, payload) in enumerate(training(begin=now - 783), 1):
        history.apply(Event(seq, when, payload.type, dataclasses.asdict(payload)))
    header = RunHeader()
    header._run_name, header._history, header._plan, header._now = "run", history, plan, now
    header._status = Status("running", attempt=1, created=now - 783, started=now - 783)
    for width in (50, 60, 80, 120):
        line = text([header.draw(width, 2)[1]])
        assert "step 240/412 " in line
        assert "ETA 9 min" in line
        assert ("so far" in line) is (width > 50)
