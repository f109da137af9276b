"""``finetui runs``: every run of this user, newest first, or those of another machine."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from ..columns import Column
from ..format import STATE_GLYPHS, ago, duration, loss, rate, usd
from ..run_table import RunRow, RunScanner, place_of
from .options import JsonFlag
from .places import HostFlag, the_runs

_COLUMNS = (
    Column("state"), Column("run", least=14), Column("step", right=True), Column("loss", right=True),
    Column("eval", right=True, rank=1), Column("tok/s", right=True, rank=5), Column("time", right=True, rank=3),
    Column("cost", right=True, rank=4), Column("created", right=True, rank=2),
)  # fmt: skip


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
    from ..fit_view import print_table

    print_table(_COLUMNS, [_words(row) for row in rows])


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
