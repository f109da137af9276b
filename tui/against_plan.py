"""A run against its plan: each figure that was predicted, beside what was measured so far."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..planner.plan import Plan
from . import format  # noqa: A004
from .history import History


def predicted_and_measured(
    history: History, plan: Plan, ends_s: float
) -> list[tuple[str, float, float, Callable[[float], str]]]:
    """Label, predicted and measured figure, and how to write it; NaN is a figure that there is none of yet.

    Args:
        history: the run.
        plan: its plan.
        ends_s: the seconds it was at work, or will have been at its end.
    """
    used = [gpu["memory_used_gib"] for gpu in history.gpus.values() if gpu.get("memory_used_gib") is not None]
    memory, peak = plan.memory, max(history.peak_gib.values(), default=math.nan)
    cost = plan.cost.usd_per_h * ends_s / 3600
    rows = [
        ("tokens/s", plan.speed.tokens_per_s, history.median_rate(), format.rate),
        ("time at the end", plan.time_s, ends_s, format.duration),
        *([("cost at the end", plan.cost.usd, cost, format.usd)] if plan.cost.usd_per_h else []),
    ]
    if plan.hardware.kind == "cpu":  # there is no allocator to ask: the peak is that of the process
        rows.append(("process, peak", memory.device_gib, peak, format.gib))
    else:
        reserved = max(history.reserved_gib.values(), default=math.nan)
        rows += [
            ("peak reserved", memory.reserved_gib, reserved, format.gib),
            ("peak allocated", memory.allocated_gib, peak, format.gib),
            ("device, now", memory.device_gib, max(used, default=math.nan), format.gib),
        ]
    if plan.speed.mfu:
        rows.append(("MFU", plan.speed.mfu, history.mfu(plan), "{:.1%}".format))
    return rows
