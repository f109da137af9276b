"""Faults that only a GPU has. Run with: ``pytest -m cuda tests/faults/test_supervision_cuda.py``"""

from __future__ import annotations

from pathlib import Path

import pytest

from finetui.engine.planning import plan_for
from finetui.engine.run import Run
from finetui.engine.supervision.gpulock import holders
from finetui.engine.supervisor import supervise
from finetui.planner.calibration import history
from finetui.planner.recipe import Recipe
from finetui.planner.state import state_dir

from .harness import recipe_for, told

pytestmark = pytest.mark.cuda
WORKER = str(Path(__file__).with_name("ruined_worker.py"))


def a_gpu_run(ground: tuple[Path, Path], root: Path, fault: str, gpus: int, **recipe: object) -> Run:
    asked = recipe_for(*ground, max_steps=12, **recipe)
    asked["hardware"] = {"device": "cuda", "gpus": gpus}
    asked["micro_batch"] = 4
    built = Recipe.build(asked)
    run = Run.create(built, plan_for(built), root=root)
    (run.path / "fault").write_text(fault)
    return run


def test_a_real_lack_of_memory_halves_the_micro_batch(ground: tuple[Path, Path], tmp_path: Path) -> None:
    run = a_gpu_run(ground, tmp_path, "oom-real", 1)
    assert supervise(run, worker=(WORKER,)).state == "finished"
    assert run.plan.resolved.micro_batch == 2
    (failure,) = [event.data for event in told(run, "failure")]
    assert failure["needed_gib"] > 1000
    # A model this small says nothing of how others will fare: the run is remembered, no lesson is drawn from it.
    assert [(run.memory, run.at_least) for run in history(state_dir())] == [(None, False)]
    assert holders(run.plan.resolved.gpus) == []


def test_a_collective_that_a_peer_never_joins_is_found(ground: tuple[Path, Path], tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run = a_gpu_run(ground, tmp_path, "hang", 2, limits={"hang_s": 20.0}, batch_size=8)
    assert supervise(run, worker=(WORKER,)).state == "finished"
    assert run.recorded.attempt == 2
    assert "rank 1 has not moved" in told(run, "warning")[0].data["what"]
    assert "wait_for_ever" in run.log_path(1).read_text()
    assert "most recent call first" in run.log_path(0).read_text()  # it spins in NCCL
