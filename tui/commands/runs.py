"""``finetui runs``: every run of this user, newest first, or those of another machine."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from ..format import STATE_GLYPHS, ago, duration, loss, rate, usd
from ..run_table import RunRow, RunScanner, place_of
from .options import JsonFlag
from .places import HostFlag, the_runs

#: Columns of a terminal that shows speed and cost as well.
_WIDE = 110


def runs(host: HostFlag = None, as_json: JsonFlag = False) -> None:
    """All runs, whatever folder they were started from."""
    with the_runs(None, host) as found:
        rows = RunScanner(lambda: found, time.time).scan()
        answer = [summary(row) for row in rows]
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    if not rows:
        print("No runs yet. Start one with: finetui quickstart" if host is None else f"There are no runs on {host}.")
        return
    from rich.table import Table

    from ..console import Console

    console = Console(highlight=False)
    headings = ["state", "run", "step", "loss", "eval", "tok/s", "time", "cost", "created"]
    if console.width < _WIDE:
        headings = [heading for heading in headings if heading not in ("tok/s", "cost")]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("state", "run") else "right", no_wrap=True)
    for row in rows:
        words = _words(row)
        table.add_row(*(words[heading] for heading in headings))
    console.print(table)


def _words(row: RunRow) -> dict[str, str]:
    return {
        "state": f"{STATE_GLYPHS[row.state][0]} {row.state}" + (f" ({row.cause})" if row.cause else ""),
        "run": row.run.name,
        "step": f"{row.step}/{row.steps}",
        "loss": loss(_finite(row.loss)),
        "eval": loss(_finite(row.held_out)),
        "tok/s": rate(row.tokens_per_s) if math.isfinite(row.tokens_per_s) else "–",
        "time": duration(row.elapsed_s),
        "cost": usd(row.cost_usd),
        "created": ago(row.created),
    }


def summary(row: RunRow) -> dict[str, Any]:
    """What a list of runs shows of one: state, progress, last losses, times, money, and what to do about its end."""
    return {
        "name": row.run.name,
        "path": place_of(row.run),
        "state": row.state,
        "cause": row.cause,
        "message": row.message,
        "do": row.do,
        "step": row.step,
        "steps": row.steps,
        "loss": _finite(row.loss),
        "eval_loss": _finite(row.held_out),
        "best_eval_loss": _finite(row.best),
        "tokens_per_s": _finite(row.tokens_per_s),
        "elapsed_s": round(row.elapsed_s, 1),
        "cost_usd": round(row.cost_usd, 4),
        "planned_s": _finite(row.planned_s),
        "peak_reserved_gib": _finite(row.peak_gib),
        "planned_device_gib": _finite(row.planned_gib),
        "checkpoint_step": row.checkpoint_step,
        "hardware": row.place,
        "model": row.model,
        "created": row.created,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
