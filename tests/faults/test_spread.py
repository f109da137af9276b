"""A run that goes on with other numbers of processes trains on the same rows, and comes to the same losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetui.engine.run import Run
from finetui.engine.supervision.spread import spread
from finetui.planner.errors import RunError

from .harness import Forge, gone, require_orderly, told, wait_until

MakeRun = Callable[..., Run]


def go_on(forge: Forge, run: Run, until: int | None = None) -> None:
    """Start or resume it; stop it in an orderly way after a step, or let it finish."""
    supervisor = forge.start(run)
    if until is not None:
        wait_until(lambda: gone(supervisor) or len(told(run, "step")) >= until)
        run.request("stop")
    wait_until(lambda: gone(supervisor))
    assert run.recorded.state in {"stopped", "finished"}, run.recorded


def figures(run: Run) -> list[list[float]]:
    steps = {event.data["step"]: event.data for event in told(run, "step")}
    return [[steps[step][name] for step in sorted(steps)] for name in ("loss", "grad_norm", "tokens", "learning_rate")]


def test_from_one_to_two_and_back(forge: Forge, a_run: MakeRun) -> None:
    tuning = {"type": "lora", "rank": 4}  # dropout would draw other numbers on other ranks
    whole, moved = a_run(24, tuning=tuning), a_run(24, tuning=tuning)
    go_on(forge, whole)
    go_on(forge, moved, until=3)
    plan = spread(moved, 2)
    assert (plan.resolved.world_size, plan.resolved.batch_size) == (2, whole.plan.resolved.batch_size)
    go_on(forge, moved, until=6)
    assert {event.data["rank"] for event in told(moved, "memory")} == {0, 1}
    spread(moved, 1)
    go_on(forge, moved)
    require_orderly(moved)
    assert moved.recorded.state == "finished"
    assert sum("processes: 1 -> 2" in event.data["line"] for event in told(moved, "log")) == 1
    for ours, theirs in zip(figures(moved), figures(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_what_can_t_be_shared_is_refused_in_words(a_run: MakeRun) -> None:
    run = a_run()
    run.update(state="stopped")
    with pytest.raises(RunError, match="8 rows can't be shared evenly by 3") as caught:
        spread(run, 3)
    assert "1, 2, 4, 8" in caught.value.do
    assert run.plan.resolved.world_size == 1
