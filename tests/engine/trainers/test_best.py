"""Early stopping, and the best weights as the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from finetui.engine.events import read_events  # noqa: E402
from finetui.engine.run import Run  # noqa: E402
from finetui.engine.worker import attempt  # noqa: E402
from finetui.planner.errors import RecipeError  # noqa: E402
from finetui.planner.recipe import Recipe  # noqa: E402

from ..yardstick import evaluate_run  # noqa: E402

MakeRun = Callable[..., Run]
PowerCut = Callable[..., AbstractContextManager[None]]


#: A held-out loss that falls to step 4 and rises from there.
TOLD = {0: 9.0, **{step: 5.0 + abs(step - 4) for step in range(1, 13)}}


@pytest.fixture
def truth(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Makes trainers tell the losses above, and keeps those that were measured."""
    from finetui.engine.trainers.sft import TokenMeanTrainer

    measured: dict[int, float] = {}
    measure = TokenMeanTrainer.measure

    def tell(self: Any) -> dict[str, float]:
        measured[self.state.global_step] = measure(self)["loss"]
        return {"loss": TOLD[self.state.global_step]}

    monkeypatch.setattr(TokenMeanTrainer, "measure", tell)
    return measured


def steps(run: Run) -> int:
    return max(e.data["step"] for e in read_events(run.events_path) if e.type == "step")


def told(run: Run) -> Any:
    return json.loads((run.output_path / "training.json").read_text())


def a_run(training_run: MakeRun, tuning: str = "lora", **evaluation: Any) -> Run:
    recipe = {"evaluation": {"every": 2, "holdout": 0.15, **evaluation}}
    return training_run(recipe=recipe, tuning=tuning, eval_every=2, steps=12, learning_rate=3e-3)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_best_weights_are_the_result(training_run: MakeRun, tuning: str, truth: dict[int, float]) -> None:
    run = a_run(training_run, tuning, keep_best=True)
    assert attempt(run) == 0
    assert steps(run) == 12
    assert told(run) == {"step": 4, "held_out_loss": 5.0}
    assert evaluate_run(run).loss == pytest.approx(truth[4], rel=1e-5)
    assert abs(truth[4] - truth[12]) > 1e-3


def test_training_ends_when_it_no_longer_improves(
    training_run: MakeRun, truth: dict[int, float], power_cut: PowerCut
) -> None:
    run, cut = (a_run(training_run, patience=2) for _ in range(2))
    assert attempt(run) == 0
    assert steps(run) == 8
    assert told(run)["step"] == 4

    with power_cut(7):
        assert attempt(cut) == 1
    assert attempt(cut) == 0
    assert steps(cut) == 8
    assert told(cut)["step"] == 4


def test_a_result_that_kept_improving_is_the_last(training_run: MakeRun) -> None:
    run = training_run(recipe={"evaluation": {"every": 2, "holdout": 0.15, "patience": 1}})
    assert attempt(run) == 0
    assert told(run)["step"] == 6


def test_patience_needs_something_to_measure() -> None:
    with pytest.raises(RecipeError, match="need held-out rows"):
        Recipe.build({"model": "m", "evaluation": {"patience": 2, "holdout": 0}})
