"""Limits on time and money, on a clock that nobody can set."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from finetui.engine.run import Run
from finetui.engine.status import Status
from finetui.engine.supervision import budget
from finetui.engine.supervision.budget import Budget
from finetui.planner.limits import Limits


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since boot, as a test wants them."""
    now = [5000.0]
    monkeypatch.setattr(budget, "now_s", lambda: now[0])
    return now


def test_what_earlier_attempts_spent_counts(make_run: Callable[..., Run], boot: list[float]) -> None:
    run = make_run(usd_per_h=3.6)  # a thousandth of a dollar per second
    status = Status(spent_s=1000.0)
    both = Budget.of(run, run.plan, Limits(cost_usd=2.0, hours=1.0), status)
    assert both.exceeded() is None
    boot[0] += 935.0
    assert both.exceeded() is None
    boot[0] += 10.0  # 60 s are kept for the last checkpoint
    assert both.exceeded() == "cost"
    assert Budget.of(run, run.plan, Limits(hours=0.25), status).exceeded() == "hours"
    assert Budget.of(run, run.plan, Limits(), status).exceeded() is None


def test_a_clock_that_is_set_changes_nothing(
    make_run: Callable[..., Run], boot: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, started = make_run(), time.time()
    limit = Budget.of(run, run.plan, Limits(hours=1.0), Status(started=started))
    monkeypatch.setattr(time, "time", lambda: started + 10 * 365 * 86400)
    assert limit.exceeded() is None
    boot[0] += 120.0
    assert limit.ended(started) == started + 120.0
    assert Status(started=started, ended=limit.ended(started)).elapsed_s() == 120.0
