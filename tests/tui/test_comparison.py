"""Runs side by side: curves over four axes, what differs, and the figures beside their plans."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from finetui.engine.events import Eval, MemoryUse, State, Step, read_events
from finetui.engine.run import Run
from finetui.planner.recipe import Recipe
from finetui.tui.comparison import AXES, Contender, differences, outcome, outcome_rows

MakeRun = Callable[..., Run]
BEGIN = 1_772_000_000.0


def contender(run: Run) -> Contender:
    found = Contender.of(run)
    found.take(read_events(run.events_path))
    return found


def two_attempts() -> list[tuple[float, Any]]:
    """Ten seconds of work, an hour of nothing, ten seconds of work."""
    events: list[tuple[float, Any]] = [(BEGIN, State("preparing", attempt=1))]
    events += [(BEGIN + 5 * n, Step(n, 0.1, 3.0 - n, 1e-4, 1.0, 100 * n, 20.0, 5.0, 4)) for n in (1, 2)]
    later = BEGIN + 3600
    events += [(later, State("preparing", attempt=2))]
    events += [(later + 5 * (n - 2), Step(n, 0.1, 3.0 - n, 1e-4, 1.0, 100 * n, 20.0, 5.0, 4)) for n in (3, 4)]
    return [*events, (later + 10, Eval(4, 0.5)), (later + 10, MemoryUse(0, 8.0, 9.5, 9.0))]


def test_the_time_between_attempts_does_not_count(make_run: MakeRun) -> None:
    recipe = Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "qlora", "hardware": {"gpu": "H100 SXM"}})
    one = contender(make_run("one", two_attempts(), recipe=recipe, state="finished"))
    assert one.elapsed_s == pytest.approx(20.0)
    assert [one.curve("loss", axis).last_x for axis in AXES] == [4, 400, 20.0, pytest.approx(20 * 2.49 / 3600)]
    assert one.curve("held-out loss", "tokens").last_x == 400
    assert not one.curve("loss of patience", "step")
    result = outcome(one)
    assert (result.held_out, result.peak_gib, result.tokens_per_s) == (0.5, 9.5, 20.0)
    assert result.usd == pytest.approx(20 * 2.49 / 3600)


def test_only_settings_that_differ_are_named(make_run: MakeRun) -> None:
    build = Recipe.build
    low = contender(make_run("low", recipe=build({"model": "a/b", "tuning": {"type": "qlora", "rank": 8}})))
    high = contender(make_run("high", recipe=build({"model": "a/b", "tuning": {"type": "qlora", "rank": 64}})))
    assert dict(differences([low, high])) == {"rank": ["8", "64"], "alpha": ["16", "128"]}
    assert differences([low, low]) == []


def test_a_run_without_a_plan_is_shown_all_the_same(make_run: MakeRun) -> None:
    run = make_run("bare", [])
    (run.path / "plan.json").unlink()
    bare = contender(run)
    assert bare.plan is None
    rows = dict(outcome_rows([outcome(bare)]))
    assert rows["tokens/s"] == ["–"]
    assert dict(differences([bare, contender(make_run("whole"))]))["tuning"] == ["–", "qlora"]


def test_measured_figures_stand_beside_the_planned_ones(make_run: MakeRun) -> None:
    result = outcome(contender(make_run("one", two_attempts())))
    planned = dataclasses.replace(result, planned_tokens_per_s=10.0, planned_gib=19.0, planned_s=math.nan)
    rows = dict(outcome_rows([planned]))
    assert (rows["tokens/s"], rows["reserved"], rows["time"]) == (["20 (+100%)"], ["9.5 GiB (-50%)"], ["20 s"])
    silent = dataclasses.replace(planned, tokens_per_s=math.nan)
    assert dict(outcome_rows([silent]))["tokens/s"] == ["– (plan 10)"]
