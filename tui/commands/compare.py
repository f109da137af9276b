"""``finetui compare``: runs side by side: how each came out against its plan, and the settings that differ."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Any

import typer

from ...engine.events import read_events
from ...engine.run import Run, list_runs
from ...planner.errors import RunError
from ..comparison import Contender, differences, outcome, outcome_rows
from .options import JsonFlag

RunsArgument = Annotated[list[str] | None, typer.Argument(help="Names or folders of runs; the two newest by default.")]


def compare(runs: RunsArgument = None, as_json: JsonFlag = False) -> None:
    """Compare runs: loss, speed, memory, time and money beside what was planned, and the settings that differ."""
    found = [Run.open(name) for name in runs] if runs else list_runs()[:2]
    if not found:
        raise RunError("there are no runs to compare", do="Start one with: finetui quickstart")
    contenders = [Contender.of(run) for run in found]
    for contender in contenders:
        contender.take(read_events(contender.run.events_path))
    different = differences(contenders)
    if as_json:
        rows = [
            {"name": contender.run.name, "path": str(contender.run.path), **_figures(contender)}
            for contender in contenders
        ]
        print(json.dumps({"runs": rows, "settings": dict(different)}, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", style="dim")
    for contender in contenders:
        table.add_column(contender.run.name, overflow="fold")
    for label, values in outcome_rows([outcome(contender) for contender in contenders]):
        table.add_row(label, *values)
    table.add_section()
    for key, values in different:
        table.add_row(key.replace("_", " "), *values)
    Console(highlight=False).print(table)


def _figures(contender: Contender) -> dict[str, Any]:
    figures = dataclasses.asdict(outcome(contender))
    return {key: round(value, 6) if math.isfinite(value) else None for key, value in figures.items()}
