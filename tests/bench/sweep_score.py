"""How far the planner was off in a sweep (``tests/bench/sweep.py``), per program and run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .sweep_cases import Case
from .sweep_plan import predicted


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file of lines, or of a table kept in ``results``, each predicted anew."""
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text)["rows"] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    # What was measured before the program changed how it does it (``before`` says what) is kept, and not scored.
    return [{**row, "predicted": predicted(Case(**row["case"]))} for row in rows if not row.get("before")]


def facts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a sweep: settings and measurements; predictions are made anew whenever it is read."""
    kept = ("case", "measured", "failed", "fits", "fallbacks")
    return {"summary": score(rows), "rows": [{key: row[key] for key in kept if key in row} for row in rows]}


def score(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors per program, and what was said to fit and did not."""
    summary: dict[str, Any] = {}
    for stack in sorted({row["case"]["stack"] for row in rows}):
        mine = [row for row in rows if row["case"]["stack"] == stack]
        done = [row for row in mine if row.get("measured")]
        # A capped run may have given memory back.
        whole = [row for row in done if not row["case"]["card"] and row["measured"].get("allocated_gib")]
        allocated = [_off(row, "allocated_gib") for row in whole]
        reserved = [_off(row, "reserved_gib") for row in whole if row["measured"].get("reserved_gib")]
        timed = [_off(row, "tokens_per_s") for row in done if row["measured"].get("tokens_per_s")]
        summary[stack] = {
            "configurations": len(mine), "failed": len(mine) - len(done),
            "said_to_fit_but_out_of_memory": sum(
                bool(row.get("fits")) and str(row.get("failed", "")).startswith("oom") for row in mine
            ),
            "memory_rows": len(whole),
            "allocated_median": statistics.median(map(abs, allocated)) if allocated else None,
            "allocated_worst": max(allocated, key=abs) if allocated else None,
            "reserved_median": statistics.median(map(abs, reserved)) if reserved else None,
            "reserved_under": sum(off < -0.05 for off in reserved),
            "speed_rows": len(timed),
            "speed_median": statistics.median(map(abs, timed)) if timed else None,
            "speed_worst": max(timed, key=abs) if timed else None,
            "speed_inside_interval": sum(_inside(row) for row in done if row["measured"].get("tokens_per_s")),
        }  # fmt: skip
    return summary


def _off(row: dict[str, Any], what: str) -> float:
    return float(row["predicted"][what] / row["measured"][what] - 1)


def _inside(row: dict[str, Any]) -> bool:
    predicted = row["predicted"]
    return bool(predicted["low_tokens_per_s"] <= row["measured"]["tokens_per_s"] <= predicted["high_tokens_per_s"])


def table(rows: list[dict[str, Any]]) -> str:
    """One line per run, the worst prediction first."""
    lines = []
    for row in rows:
        name = Case(**row["case"]).name
        if not row.get("measured"):
            lines.append((9.0, f"{name:95} failed: {str(row.get('failed', 'not measured'))[:80]}"))
            continue
        measured, predicted, off = row["measured"], row["predicted"], 0.0
        speed, peak = "", " " * 24  # of some runs the speed alone is known
        if measured.get("allocated_gib"):
            off = _off(row, "allocated_gib")
            peak = f" {predicted['allocated_gib']:7.2f} of {measured['allocated_gib']:7.2f} {off:+6.1%}"
        held = f" reserved {_off(row, 'reserved_gib'):+6.1%}" if measured.get("reserved_gib") else " " * 16
        if measured.get("tokens_per_s"):
            speed = f" {predicted['tokens_per_s']:8.0f} of {measured['tokens_per_s']:8.0f} tok/s"
            low, high = (predicted[f"{end}_tokens_per_s"] / predicted["tokens_per_s"] - 1 for end in ("low", "high"))
            speed += f" {_off(row, 'tokens_per_s'):+6.1%} ({low:+.0%} {high:+.0%}){'' if _inside(row) else ' !'}"
        lines.append((abs(off), f"{name:95}{peak}{held} {predicted['moment']:9}{speed}"))
    return "\n".join(line for _, line in sorted(lines, reverse=True))
