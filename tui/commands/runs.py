"""``finetui runs``: every run of this user, newest first."""

from __future__ import annotations

import json
import math
from typing import Any

from ...engine.run import Run, list_runs
from ..format import STATE_GLYPHS, ago, duration, loss
from ..watch import history_of
from .options import JsonFlag


def runs(as_json: JsonFlag = False) -> None:
    """All runs, whatever folder they were started from."""
    rows = [summary(run) for run in list_runs()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("No runs yet. Start one with: finetui quickstart")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, justify in (("state", "left"), ("run", "left"), ("step", "right"), ("loss", "right"),
                             ("eval", "right"), ("time", "right"), ("created", "right")):  # fmt: skip
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        state = f"{STATE_GLYPHS[row['state']][0]} {row['state']}" + (f" ({row['cause']})" if row["cause"] else "")
        table.add_row(state, row["name"], f"{row['step']}/{row['steps']}", loss(row["loss"]), loss(row["eval_loss"]),
                      duration(row["elapsed_s"]), ago(row["created"]))  # fmt: skip
    Console(highlight=False).print(table)


def summary(run: Run) -> dict[str, Any]:
    """What a list of runs shows of one: state, progress, last losses, times."""
    status, history = run.status, history_of(run)
    return {
        "name": run.name,
        "path": str(run.path),
        "state": status.state,
        "cause": status.cause,
        "step": history.step,
        "steps": history.steps,
        "loss": _finite(history.loss.latest),
        "eval_loss": _finite(history.evaluation.latest),
        "tokens_per_s": _finite(history.tokens_per_s.latest),
        "elapsed_s": round(status.elapsed_s(), 1),
        "created": status.created,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
