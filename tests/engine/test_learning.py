"""A finished run becomes one line of the planner's history."""

from __future__ import annotations

import pytest

from finetui.engine.learning import learn_from
from finetui.engine.planning import finished_runs
from finetui.planner.architecture import Architecture
from finetui.planner.hardware import Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan


class _Run:
    """As much of a run directory as is read."""

    name = "a-run"

    def __init__(self, path) -> None:
        self.events_path = path


@pytest.fixture
def plan() -> Plan:
    architecture = Architecture.from_config(find_config("Qwen/Qwen3-8B")[1], "Qwen/Qwen3-8B")
    return make_plan(Recipe(model="m"), architecture, Node(find_gpu("H200"), local=True))


def written(tmp_path, speeds: list[float], peaks: dict[int, float]) -> _Run:
    import json

    lines = [{"type": "step", "tokens_per_s": speed} for speed in speeds]
    lines += [{"type": "memory", "rank": rank, "peak_gib": peak} for rank, peak in peaks.items()]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps({"seq": n, "time": 0.0, **line}) + "\n" for n, line in enumerate(lines, 1)))
    return _Run(path)


def test_warm_steps_and_the_fullest_rank_count(tmp_path, monkeypatch, plan):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    warm = plan.speed.tokens_per_s * 1.1
    run = written(tmp_path, [1.0, 2.0, 3.0, *[warm] * 8, 5.0], {0: 1.0, 1: plan.memory.allocated_gib})
    learnt = learn_from(run, plan)
    assert learnt is not None
    assert learnt.speed == pytest.approx(1.1)
    assert learnt.memory == pytest.approx(1.0)
    assert list(finished_runs()) == [learnt]


def test_a_run_of_a_few_steps_teaches_nothing(tmp_path, monkeypatch, plan):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert learn_from(written(tmp_path, [100.0] * 6, {}), plan) is None
    assert list(finished_runs()) == []
