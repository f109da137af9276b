"""The limits of a run on time and money, as points on a clock that nobody can set."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Self

from ...planner.limits import Limits
from ...planner.plan import Plan
from ..events import Warn
from ..run import Run
from ..status import Status


def now_s() -> float:
    """Seconds since boot, those that the machine slept included: they are paid for as well."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Budget:
    """When each limit is reached; None without that limit."""

    begun: float
    """When the supervisor of this run began."""
    money_ends: float | None
    time_ends: float | None

    @classmethod
    def of(cls, run: Run, plan: Plan, limits: Limits, status: Status) -> Self:
        """What ``status.spent_s`` of earlier attempts has left; a limit that has no effect is said so."""
        begun = now_s()
        money_ends = None
        if limits.cost_usd is not None:
            if plan.cost.usd_per_h > 0:
                seconds = limits.cost_usd / plan.cost.usd_per_h * 3600
                # The last checkpoint costs as well.
                money_ends = begun - status.spent_s + seconds - min(60.0, 0.05 * seconds)
            else:
                what = "limits.cost_usd has no effect: the plan has no price"
                run.append(Warn(what, where=run.name, do="Plan with a priced GPU, or use limits.hours."))
        time_ends = begun - status.spent_s + limits.hours * 3600 if limits.hours is not None else None
        return cls(begun, money_ends, time_ends)

    def exceeded(self) -> Literal["cost", "hours"] | None:
        """Which limit is reached, if any."""
        now = now_s()
        if self.money_ends is not None and now >= self.money_ends:
            return "cost"
        if self.time_ends is not None and now >= self.time_ends:
            return "hours"
        return None

    def ended(self, started: float) -> float:
        """Wall time of the end as the wall clock would have it, had nobody set it since ``started``."""
        return started + now_s() - self.begun
