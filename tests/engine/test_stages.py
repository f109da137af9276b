"""A staged run for real: processes, in the order of the stages, that survive being stopped and killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from finetui.engine.evaluation.records import evaluations_of
from finetui.engine.events import read_events
from finetui.engine.launcher import kill, resume, start, stop
from finetui.engine.planning import plan_for
from finetui.engine.run import Run, trained
from finetui.engine.status import LIVE_STATES
from finetui.planner.recipe import Recipe


@pytest.fixture
def staged(model_folder: Callable[[str], Path], rows_file: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(stages: list[dict[str, Any]], **recipe: Any) -> Run:
        built = Recipe.build({
            "model": str(model_folder("llama")), "data": str(rows_file), "tuning": {"type": "lora", "rank": 4},
            "batch_size": 4, "packing": False, "max_steps": 4, "epochs": 1000, "checkpoint": {"every": 2}, "track": [],
            "evaluation": {"every": 2, "holdout": 0.15}, "optimizer": {"learning_rate": 0.01},
            "hardware": {"device": "cpu", "gpus": 1}, "stages": stages, **recipe,
        })  # fmt: skip
        return Run.create(built, plan_for(built), root=tmp_path / "runs", name="flow")

    return make


def wait(run: Run, until: Callable[[], bool] | None = None, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while run.status.state in LIVE_STATES and not (until and until()):
        assert time.monotonic() < deadline, read_events(run.events_path)[-3:]
        time.sleep(0.1)


def steps(run: Run) -> list[int]:
    return [event.data["step"] for event in read_events(run.events_path) if event.type == "step"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], int]:
    """Carries a staged run out in this process: what would be processes of their own are calls."""
    from finetui.engine import stages, worker

    def begin(child: Run) -> None:
        child.update(state="running", attempt=child.recorded.attempt + 1)
        done = worker.attempt(child) == 0
        told = [event.data["message"] for event in read_events(child.events_path) if event.type == "failure"]
        child.update(state="finished" if done else "failed", cause=None if done else "data", message="".join(told[-1:]))

    def apart(self: stages.Chain, what: str) -> None:
        assert stages.act(self.run, what) == 0
        self.notes["done"] = stages._read_notes(self.run)["done"]

    monkeypatch.setattr(stages, "start", begin)
    monkeypatch.setattr(stages, "resume", begin)
    monkeypatch.setattr(stages.Chain, "_apart", apart)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return stages.attempt


def test_each_stage_begins_with_what_the_one_before_made(
    staged: Callable[..., Run], in_process: Callable[[Run], int], tmp_path: Path
) -> None:
    run = staged([
        {}, {"name": "more", "tuning": {"start_from": "previous"}}, {"name": "full", "tuning": "full"},
        {"do": "evaluate"}, {"do": "export", "path": str(tmp_path / "model")},
    ])  # fmt: skip
    assert in_process(run) == 0
    first, second, third = (Run(run.path.parent / f"flow.{name}") for name in ("1-sft", "2-more", "3-full"))
    held_out = [
        [e.data["loss"] for e in read_events(r.events_path) if e.type == "eval"] for r in (first, second, third)
    ]
    assert held_out[1][0] == pytest.approx(held_out[0][-1], rel=1e-4)  # the adapter goes on
    assert held_out[2][0] == pytest.approx(held_out[1][-1], rel=1e-4)  # merged into the weights
    assert second.recipe.model == first.recipe.model
    assert third.recipe.model == str(second.path / "merged")
    assert steps(run) == list(range(1, 13))
    done = json.loads((run.path / "stages.json").read_text())["done"]
    assert done["evaluate"]["loss"] == pytest.approx(held_out[2][-1], rel=1e-4)
    (kept,) = evaluations_of(third)
    assert kept[0].endswith("-evaluate")
    assert [model["label"] for model in kept[1]["models"]] == ["base", third.name]
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert trained(run).path == third.path
    assert trained(third).path == third.path


def test_what_is_done_is_not_done_again(staged: Callable[..., Run], in_process: Callable[[Run], int]) -> None:
    run = staged([{"max_steps": 2}, {"do": "evaluate"}])
    assert in_process(run) == 0
    told = len(steps(run))
    assert in_process(run) == 0
    assert len(steps(run)) == told == 2
    assert Run(run.path.parent / "flow.1-sft").recorded.attempt == 1


def test_a_stage_that_fails_says_why(
    staged: Callable[..., Run], in_process: Callable[[Run], int], tmp_path: Path
) -> None:
    run = staged([{"tuning": {"start_from": str(tmp_path / "none")}}, {"name": "never"}])
    assert in_process(run) == 1
    failure = next(event.data for event in read_events(run.events_path) if event.type == "failure")
    assert failure["message"].startswith("stage sft failed: there is no adapter here")
    assert not (run.path.parent / "flow.2-never").exists()


@pytest.mark.slow
def test_a_staged_run_is_stopped_and_killed_and_goes_on_where_it_was(staged: Callable[..., Run]) -> None:
    run = staged([{"max_steps": 2}, {"name": "more", "max_steps": 100_000}])
    second = Run(run.path.parent / "flow.2-more")
    start(run)
    wait(run, lambda: (second.path / "run.json").is_file() and len(steps(second)) > 3)
    assert run.status.state == "running"
    stop(run)
    wait(run)
    assert run.status.state == second.status.state == "stopped", run.status
    reached = steps(second)[-1]
    resume(run)
    wait(run, lambda: steps(second)[-1] > reached)
    assert steps(second)[steps(second).index(reached) + 1] == reached + 1
    kill(run)
    assert {run.status.state, second.status.state} <= {"stopped", "lost", "failed"}
    assert Run(run.path.parent / "flow.1-sft").status.attempt == 1


@pytest.mark.slow
def test_stages_train_on_two_ranks(staged: Callable[..., Run], tmp_path: Path) -> None:
    rows = [{"prompt": f"colour {i}?", "chosen": " red like a rose", "rejected": " grey"} for i in range(12)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = staged(
        [
            {"max_steps": 2},
            {"method": "dpo", "data": str(pairs), "max_steps": 2, "tuning": {"start_from": "previous"}},
            {"do": "merge"},
        ],
        hardware={"device": "cpu", "gpus": 2, "strategy": "ddp"},
    )
    start(run)
    wait(run)
    assert run.status.state == "finished", [e.data for e in read_events(run.events_path) if e.type == "failure"]
    first, second = (Run(run.path.parent / f"flow.{name}") for name in ("1-sft", "2-dpo"))
    assert steps(run) == [1, 2, 3, 4]
    for stage in (first, second):
        assert stage.plan.resolved.strategy == "ddp"
        assert sorted(path.name for path in (stage.path / "log").glob("rank*.log")) == ["rank0.log", "rank1.log"]
    assert (second.path / "merged" / "model.safetensors").is_file()


def test_the_shipped_workflow_plans_and_trains(
    in_process: Callable[[Run], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = Path(__file__).resolve().parents[2] / "presets" / "alignment.yaml"
    assert [stage.name for stage in plan_for(Recipe.load(preset, {"hardware.gpu": "h100"})).stages] == [
        "answers", "preferences", "evaluate", "export",
    ]  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = {
        "model": str(preset.parent / "tiny"), "tuning.rank": 4, "tuning.alpha": 8, "sequence_length": 128,
        "hardware": {"device": "cpu", "gpus": 1}, "max_steps": 2, "batch_size": 4, "track": [],
    }  # fmt: skip
    recipe = Recipe.load(preset, small)
    run = Run.create(recipe, plan_for(recipe), root=tmp_path / "runs", name="flow")
    assert in_process(run) == 0, [e.data for e in read_events(run.events_path) if e.type == "failure"]
    second = Run(run.path.parent / "flow.2-preferences")
    assert second.recipe.method == "dpo"
    assert second.recipe.model == str(run.path.parent / "flow.1-answers" / "merged")
    assert (run.path / "export" / "model.safetensors").is_file()
