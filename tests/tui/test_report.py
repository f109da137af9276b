"""A run's report: every figure in it is one of the run's events."""

from __future__ import annotations

import csv
import io
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetui.engine.events import EventLog, Metrics, Warn, read_events
from finetui.engine.run import Run
from finetui.planner.errors import RunError
from finetui.tui.app import FinetuiApp
from finetui.tui.cli import VERBS
from finetui.tui.curves_svg import Drawn, curves_svg
from finetui.tui.report import Report, write_csv
from finetui.tui.series import Series
from finetui.tui.verbs import build

SVG = "{http://www.w3.org/2000/svg}"


def verb(*words: str) -> str:
    result = CliRunner().invoke(build({words[0]: VERBS[words[0]]}), list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def rows_of(run: Run) -> list[dict[str, str]]:
    out = io.StringIO()
    write_csv(run, out)
    return list(csv.DictReader(io.StringIO(out.getvalue())))


def test_the_steps_as_csv_are_those_of_the_events(fleet: list[Run]) -> None:
    run = fleet[3]  # whose last three losses are not finite
    events = read_events(run.events_path)
    steps = [event for event in events if event.type == "step"]
    rows = [row for row in rows_of(run) if row["loss"]]
    assert len(rows) == len(steps) == 160
    for row, event in zip(rows, steps, strict=True):
        assert repr(float(row["loss"])) == repr(event.data["loss"])  # nan is not equal to itself
        assert (int(row["step"]), float(row["time"]), int(row["tokens"])) == (
            event.data["step"],
            event.time,
            event.data["tokens"],
        )
    held_out = {int(row["step"]): float(row["held_out_loss"]) for row in rows_of(run) if row["held_out_loss"]}
    assert held_out == {event.data["step"]: event.data["loss"] for event in events if event.type == "eval"}


def test_the_methods_figures_have_columns(fleet: list[Run]) -> None:
    with EventLog(fleet[1].events_path) as log:
        log.append(Metrics(412, {"rewards/margins": 0.75, "odd,name\n": 1.0}))
    last = rows_of(fleet[1])[-1]
    assert (last["step"], last["rewards/margins"], last["odd,name\n"]) == ("412", "0.75", "1.0")


def test_the_summary(fleet: list[Run]) -> None:
    with EventLog(fleet[2].events_path) as log:
        log.append(Warn("a | b <script>\x1b[31m `x`"))
    text = verb("report", str(fleet[2].path))
    assert text.startswith("# qwen3-8b-full\n")
    assert "**failed (oom)** after 3 of 412 steps" in text
    assert "adamw-8bit" in text
    assert "| tokens/s | 5,123 |" in text
    assert r"a \| b \<script\>\\u001b\[31m \`x\`" in text
    assert "\x1b" not in text
    tree = json.loads(verb("report", str(fleet[3].path), "--json"))
    assert (tree["state"], tree["cause"], tree["step"], tree["loss"], tree["not_finite"]) == (
        "failed",
        "nan",
        160,
        None,
        3,
    )
    assert tree["against_plan"]["tokens/s"]["predicted"] == 5123.0


def test_the_loss_as_svg(fleet: list[Run]) -> None:
    tree = ET.fromstring(verb("report", str(fleet[3].path), "--format", "svg"))
    lines, circles = tree.findall(f"{SVG}polyline"), tree.findall(f"{SVG}circle")
    assert len(lines) == 2  # the loss and its mean; the gap at its end adds none
    assert len(circles) == 2  # before the first step, and at 100
    marks = [text.text for text in tree.iter(f"{SVG}text") if text.text in ("◆", "×", "!")]
    assert marks.count("×") == 3
    assert marks.count("◆") == 1


def test_gaps_and_names_in_svg() -> None:
    series = Series()
    for x, y in enumerate([1.0, 2.0, math.nan, 3.0, 1.0], 1):
        series.append(x, y)
    text = curves_svg("<a> & \x1b[31m", [Drawn('"q" <b>', series)], across="steps")
    tree = ET.fromstring(text)
    assert len(tree.findall(f"{SVG}polyline")) == 2
    assert "no figures yet" in curves_svg("empty", [], across="steps")


def test_several_runs_as_svg(fleet: list[Run], tmp_path: Path) -> None:
    target = tmp_path / "both.svg"
    verb(
        "compare", str(fleet[0].path), str(fleet[1].path), "--svg", str(target), "--over", "usd", "--curve", "tokens/s"
    )
    tree = ET.parse(target).getroot()
    words = {text.text for text in tree.iter(f"{SVG}text")}
    assert {fleet[0].name, fleet[1].name, "over $", "tokens/s"} <= words
    with pytest.raises(RunError, match="no curve 'lost'"):
        verb("compare", str(fleet[0].path), "--svg", str(target), "--curve", "lost")
    with pytest.raises(RunError, match="say what --svg draws"):
        verb("compare", str(fleet[0].path), "--over", "time")


def test_the_file_says_the_form_and_what_can_not_be_written_says_so(fleet: list[Run], tmp_path: Path) -> None:
    for ending, head in (("md", "# "), ("csv", "step,"), ("svg", "<svg")):
        target = tmp_path / f"out.{ending}"
        verb("report", str(fleet[1].path), "--out", str(target))
        assert target.read_text(encoding="utf-8").startswith(head)
    with pytest.raises(RunError, match="can't be written"):
        verb("report", str(fleet[1].path), "--out", str(tmp_path / "no" / "out.md"))
    with pytest.raises(RunError, match="a form of its own"):
        verb("report", str(fleet[1].path), "--json", "--format", "csv")


def test_a_run_without_steps_has_no_report(make_run: Callable[..., Run]) -> None:
    run = make_run("young", [], state="preparing")
    with pytest.raises(RunError, match="has not made a step"):
        verb("report", str(run.path))
    assert Report.of(run).figures()["loss"] is None


async def test_the_key(
    app_of: Callable[..., FinetuiApp], settle: Callable[[Any], Awaitable[None]], fleet: list[Run], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    app = app_of("monitor", fleet[1])
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("e")
        await settle(pilot)
    assert {path.suffix for path in tmp_path.glob(f"{fleet[1].name}.*")} == {".md", ".csv", ".svg"}
