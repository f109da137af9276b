"""``finetui compare``: runs side by side: how each came out against its plan, and the settings that differ."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ...planner.errors import RunError
from ..comparison import CURVES, Axis, Contender, differences, ending, outcome, outcome_rows
from ..follower import read_whole
from ..run_table import place_of
from .options import JsonFlag
from .places import HostFlag, the_runs

RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="RUN", help="Names or folders of runs; the two newest by default.")
]
SvgFlag = Annotated[Path | None, typer.Option("--svg", help="Draw the curves of the runs into this file as well.")]
CurveFlag = Annotated[
    str | None, typer.Option("--curve", help="With --svg: loss, mean loss, held-out loss, tokens/s, …")
]
OverFlag = Annotated[
    Literal["step", "tokens", "time", "usd"] | None, typer.Option("--over", help="With --svg: what the curves go over.")
]


def compare(runs: RunsArgument = None, svg: SvgFlag = None, curve: CurveFlag = None, over: OverFlag = None,
            host: HostFlag = None, as_json: JsonFlag = False) -> None:  # fmt: skip
    """Runs side by side: how each came out, and what differs. Every figure beside the planned one."""
    if svg is None and (curve or over):
        raise RunError("--curve and --over say what --svg draws", do="Name a file with --svg, or leave them out.")
    with the_runs(runs, host, 2) as found:
        if not found:
            raise RunError("there are no runs to compare", do="Start one with: finetui quickstart")
        contenders = [read_whole(run, Contender.of(run)) for run in found]
    if svg is not None:
        _draw(svg, contenders, curve or CURVES[0], over or "step")
    different = differences(contenders)
    if as_json:
        rows = [
            {"name": contender.run.name, "path": place_of(contender.run), **_figures(contender)}
            for contender in contenders
        ]
        print(json.dumps({"runs": rows, "settings": dict(different)}, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    from ..console import Console

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", style="dim")
    for contender in contenders:
        table.add_column(contender.run.name, overflow="fold")
    table.add_row("state", *(ending(contender) for contender in contenders))
    for label, values in outcome_rows([outcome(contender) for contender in contenders]):
        table.add_row(label, *values)
    table.add_section()
    for key, values in different:
        table.add_row(key.replace("_", " "), *values)
    Console(highlight=False).print(table)


def _draw(path: Path, contenders: list[Contender], curve: str, over: str) -> None:
    from ..curves_svg import Drawn, curves_svg, x_label

    axis: Axis = "$" if over == "usd" else over  # type: ignore[assignment]
    known = [*CURVES, *dict.fromkeys(name for one in contenders for name in one.further())]
    if curve not in known:
        raise RunError(f"there is no curve {curve!r}", do=f"There is: {', '.join(known)}.")
    drawn = [Drawn(one.run.name, one.curve(curve, axis), points=curve == "held-out loss") for one in contenders]
    shown = [one for one in drawn if one.series]
    try:
        path.write_text(curves_svg(curve, shown, across=axis, end_label=x_label(axis)), encoding="utf-8")
    except OSError as error:
        what = f"the picture can't be written ({error.strerror})"
        raise RunError(what, where=str(path), do="Give another path.") from error
    print(f"wrote {path}", file=sys.stderr)


def _figures(contender: Contender) -> dict[str, Any]:
    figures = dataclasses.asdict(outcome(contender))
    said = {"state": contender.status.state, "cause": contender.status.cause}
    return {**said, **{key: round(value, 6) if math.isfinite(value) else None for key, value in figures.items()}}
