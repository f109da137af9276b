"""What the Monitor draws is what the run has said: a real, recorded run, its picture read back dot by dot."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.events import Event, read_events
from finetui.engine.run import Run
from finetui.tui.app import FinetuiApp
from finetui.tui.axes import scale_of
from finetui.tui.backend import Backend
from finetui.tui.widgets.gpu_panel import GpuPanel
from finetui.tui.widgets.line_chart import DOTS, LineChart
from finetui.tui.widgets.log_pane import LogPane
from finetui.tui.widgets.run_header import RunHeader

RECORDED = Path(__file__).parent / "data" / "quickstart"
Settle = Callable[[Any], Awaitable[None]]
#: Chart, the key of its figure in a step event, and how the figure stands in the title.
CHARTS = (
    ("loss", "loss", "{:.4f}"),
    ("rate", "tokens_per_s", "{:,.0f}"),
    ("grad-norm", "grad_norm", "{:.3g}"),
)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Run, list[Event]]:
    run = Run(shutil.copytree(RECORDED, tmp_path / "quickstart"))
    return run, read_events(run.events_path)


def app_on(run: Run, events: list[Event]) -> FinetuiApp:
    backend = dataclasses.replace(Backend(), runs=lambda: [run], now=lambda: events[-1].time, machine=lambda: "CPU")
    return FinetuiApp("monitor", run, backend=backend)


def dots(chart: LineChart, roles: set[str]) -> tuple[dict[int, set[int]], int, int]:
    """The rows of lit dots by column, of cells in these roles; and how many columns and rows of dots there are."""
    lines = chart.draw(chart.size.width - 4, chart.size.height - 2)
    labelled = "┤" in "".join(text for line in lines for text, _ in line)
    left = 7 if labelled else 0
    rows = [line for line in lines if not labelled or any(character in text for text, _ in line for character in "┤│")]
    lit: dict[int, set[int]] = defaultdict(set)
    width = 0
    for y, line in enumerate(rows):
        x = 0
        for text, role in line:
            for character in text:
                code = ord(character) - 0x2800
                if 0 <= code <= 0xFF and role in roles:
                    for column in range(2):
                        for row in range(4):
                            if code & DOTS[column][row]:
                                lit[(x - left) * 2 + column].add(y * 4 + row)
                x += 1
        width = max(width, x - left)
    return lit, width * 2, len(rows) * 4


def axis_of(chart: LineChart, values: list[float]) -> tuple[float, float]:
    """The ends of a chart's y axis, which has to hold all of these values."""
    scale = scale_of(curve.series for curve in chart._curves)
    assert scale, f"{chart.label} is empty"
    assert scale.low <= min(values) <= max(values) <= scale.high
    return scale.low, scale.high


@pytest.mark.parametrize(("name", "key", "show"), CHARTS)
async def test_each_curve_dot_by_dot(
    recorded: tuple[Run, list[Event]], settle: Settle, name: str, key: str, show: str
) -> None:
    run, events = recorded
    steps = [event.data for event in events if event.type == "step"]
    async with app_on(run, events).run_test(size=(160, 50)) as pilot:
        await settle(pilot)
        await pilot.press("s", "s")  # nothing smoothed: the loss itself
        chart = pilot.app.screen.query_one(f"#{name}", LineChart)
        assert show.format(steps[-1][key]) in chart.text.splitlines()[0]
        lit, columns, rows = dots(chart, {"accent"})
        points = dots(chart, {"second"})[0]
        low, high = axis_of(chart, [data[key] for data in steps])
        end = 257.0

        def row(value: float) -> int:
            return round((1 - (value - low) / (high - low)) * (rows - 1))

        told: dict[int, list[float]] = defaultdict(list)
        for data in steps:
            told[round(data["step"] / end * (columns - 1))].append(data[key])
        hidden = {column + side for column in points for side in (-1, 0, 1)}  # behind a held-out loss
        checked = 0
        for column, values in told.items():
            if column in hidden:
                continue
            assert {row(value) for value in values} <= lit[column], (column, values)
            checked += 1
            # Nothing is drawn beside the values but the lines to the columns before and after.
            before = max((other for other in told if other < column), default=column)
            after = min((other for other in told if other > column), default=column)
            reach = [row(value) for value in values + told[before] + told[after]]
            assert min(reach) <= min(lit[column]) <= max(lit[column]) <= max(reach), column
        assert checked > 0.7 * len(told)


async def test_the_held_out_losses_are_points(recorded: tuple[Run, list[Event]], settle: Settle) -> None:
    run, events = recorded
    async with app_on(run, events).run_test(size=(160, 50)) as pilot:
        await settle(pilot)
        chart = pilot.app.screen.query_one("#loss", LineChart)
        lit, columns, rows = dots(chart, {"second"})
        told = [event.data for event in events if event.type == "eval"]
        low, high = axis_of(chart, [data["loss"] for data in told])
        for data in told:
            place = (data["loss"] - low) / (high - low)
            column = round(data["step"] / 257 * (columns - 1))
            assert round((1 - place) * (rows - 1)) in lit[column], data


async def test_every_figure_in_words(recorded: tuple[Run, list[Event]], settle: Settle) -> None:
    run, events = recorded
    newest = {event.type: event.data for event in events}
    figures_told: dict[str, float] = {}
    for event in events:
        figures_told |= event.data["values"] if event.type == "metrics" else {}
    mean = math.nan
    for number, data in enumerate((event.data for event in events if event.type == "step"), 1):
        weight = max(0.1, 1 / number)
        mean = data["loss"] if math.isnan(mean) else mean + weight * (data["loss"] - mean)
    async with app_on(run, events).run_test(size=(160, 50)) as pilot:
        await settle(pilot)
        screen = pilot.app.screen
        loss = screen.query_one("#loss", LineChart).text.splitlines()[0]
        assert f"loss {newest['step']['loss']:.4f}" in loss
        assert f"mean {mean:.4f}" in loss
        assert f"held-out {newest['eval']['loss']:.4f}" in loss
        header = screen.query_one(RunHeader).text
        assert f"step {newest['step']['step']}/{newest['step']['steps']}" in header
        assert "took 49 s" in header
        assert newest["step"]["step"] == 257
        host = screen.query_one(GpuPanel).text
        assert f"CPU {newest['host']['cpu_percent']:.0f}%" in host
        assert f"{newest['host']['disk_free_gib']:,.0f} GiB free" in host
        figures = []
        for _ in range(3):
            figures.append(screen.query_one("#figure", LineChart).text.splitlines()[0])
            await pilot.press("t")
        assert f"token_accuracy {figures_told['token_accuracy']:.4g}" in figures[0]
        assert f"eval_accuracy {figures_told['eval_accuracy']:.4g}" in figures[1]
        assert f"learning rate {newest['step']['learning_rate']:.2e}" in figures[2]
        pane = screen.query_one(LogPane)
        samples = [event.data for event in events if event.type == "sample"]
        answers = [sample["answer"] for sample in samples if sample["prompt"] == samples[0]["prompt"]]
        for view, words in (
            ("answers", [" ".join(answers[0].split())[:60], " ".join(answers[-1].split())[:60]]),
            ("plan", ["predicted"]),
            ("memory", [f"{newest['memory']['peak_gib']:.1f} GiB", f"{newest['memory']['reserved_gib']:.1f} GiB"]),
        ):
            await pilot.press("v")
            assert pane.view == view
            assert all(word in pane.text for word in words), (view, words, pane.text)
