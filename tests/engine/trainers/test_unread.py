"""Steps that are told of later: the same run as one whose host waits for each, and the same care for bad steps."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from finetui.engine.events import read_events
from finetui.engine.trainers import base, unread
from finetui.engine.trainers.sft import TokenMeanTrainer
from finetui.engine.trainers.unread import Unread
from finetui.engine.worker import attempt
from finetui.planner.errors import RunError

from .conftest import events, losses


class Guarded(torch.optim.AdamW):
    """What the fused optimiser is on a GPU: it scales gradients by itself, and makes no step by what is no number."""

    factor: torch.Tensor | None = None
    latest: Guarded

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Guarded.latest = self

    def scale_gradients(self, factor: torch.Tensor) -> None:
        self.factor = factor

    def leave_out_if(self, condition: torch.Tensor) -> None:
        assert self.factor is not None
        self.factor = torch.where(condition, torch.nan, self.factor)

    def uncount(self) -> None:
        for state in self.state.values():
            state["step"] -= 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert self.factor is not None
        factor, self.factor = self.factor, None
        if factor.isnan():
            for state in self.state.values():
                state["step"] += 1
            return None
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(factor)
        return super().step(closure)


@pytest.fixture
def late(monkeypatch):
    """Steps are told late, and the device is never known to be done before somebody waits for it."""

    def fused(model, args, emit, shards=None, *, kernels=True):
        return Guarded, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}

    def turn_on():
        monkeypatch.setattr(base, "fused_adamw", fused)
        monkeypatch.setattr(unread.Moment, "passed", False)

    return turn_on


KNOBS: dict[str, Any] = {"steps": 7, "micro_batch": 2, "accumulation": 2, "learning_rate": 1e-2, "max_grad_norm": 0.5}
RECIPE = {"evaluation": {"every": 3, "holdout": 0.1}, "checkpoint": {"every": 4}}


def test_figures_are_read_in_order_when_they_are_there(monkeypatch):
    pending = Unread(torch.device("cpu"))
    pending.begin()
    loss = torch.tensor(0.0)
    monkeypatch.setattr(unread.Moment, "passed", False)
    for step in (1, 2, 3):
        loss += step
        pending.add(step, 0.1 * step, {"loss": loss, "counts": torch.tensor([2**53 - 1, step])})
    loss += 100  # by work that comes after
    assert list(pending.read(but=math.inf)) == []
    told = list(pending.read(but=1))
    assert [(one.step, one.learning_rate) for one in told] == [(1, 0.1), (2, 0.2)]
    assert [one.figures for one in told] == [
        {"loss": [1.0], "counts": [2**53 - 1, 1.0]}, {"loss": [3.0], "counts": [2**53 - 1, 2.0]},
    ]  # fmt: skip
    assert all(one.seconds >= 0 for one in told)
    monkeypatch.setattr(unread.Moment, "passed", True)
    assert [one.step for one in pending.read(but=math.inf)] == [3]


@pytest.mark.parametrize("clipped", [0.5, 0.0])
def test_a_run_is_the_same(training_run, late, clipped):
    plain = training_run("llama", "lora", RECIPE, **{**KNOBS, "max_grad_norm": clipped})
    assert attempt(plain) == 0
    late()
    other = training_run("llama", "lora", RECIPE, **{**KNOBS, "max_grad_norm": clipped})
    assert attempt(other) == 0
    assert losses(other) == pytest.approx(losses(plain), rel=1e-6)
    for kind, names in (
        ("step", ("step", "epoch", "learning_rate", "grad_norm", "tokens")),
        ("eval", ("step", "loss")),
    ):
        mine, theirs = ([[event[name] for name in names] for event in events(run, kind)] for run in (other, plain))
        assert [value for row in mine for value in row] == pytest.approx([v for row in theirs for v in row], rel=1e-5)
    assert [e["values"] for e in events(other, "metrics")] == [e["values"] for e in events(plain, "metrics")]
    orders = [
        [event.type for event in read_events(run.events_path) if event.type in ("step", "eval")]
        for run in (other, plain)
    ]
    assert orders[0] == orders[1]
    assert all(step["step_s"] > 0 for step in events(other, "step"))


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU"])
def test_without_a_limit_gradients_stay_as_they_are(kind):
    from accelerate.utils import DistributedType

    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 3.0)
    trainer: Any = object.__new__(TokenMeanTrainer)
    trainer.shards, trainer.model, trainer._trained = None, torch.nn.Module(), [("weight", weight)]
    trainer.model.weight, trainer.optimizer = weight, torch.optim.SGD([weight])
    trainer.args, trainer._mixed_mesh_grads = SimpleNamespace(max_grad_norm=0.0), False
    trainer.accelerator = SimpleNamespace(
        distributed_type=DistributedType[kind], clip_grad_norm_=torch.nn.utils.clip_grad_norm_
    )
    assert float(trainer._get_grad_norm(trainer.model)) == pytest.approx(6.0)
    assert weight.grad.tolist() == [3.0] * 4


def test_a_state_of_other_groups_is_refused_in_words(tmp_path):
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    trainer: Any = object.__new__(TokenMeanTrainer)
    trainer.shards, trainer.lr_scheduler, trainer.optimizer = None, None, torch.optim.AdamW(weights)
    trainer._resumed_state = {"optimizer": torch.optim.AdamW(weights[:1]).state_dict()}
    with pytest.raises(RunError, match="can't go on from its state") as refused:
        trainer._load_optimizer_and_scheduler(str(tmp_path))
    assert refused.value.do


def spoil(monkeypatch, bad, by):
    """Multiply the loss of some steps, and with it their gradients; returns some weights as they were before each."""
    compute, weights = TokenMeanTrainer.compute_loss, []

    def compute_loss(self, *args, **kwargs):
        weights.append(self.trained_parameters()[-1][1].detach().clone())
        loss = compute(self, *args, **kwargs)
        return loss * by if self.state.global_step + 1 in bad else loss

    monkeypatch.setattr(TokenMeanTrainer, "compute_loss", compute_loss)
    return weights


def test_an_update_that_is_not_finite_is_left_out(training_run, late, monkeypatch):
    late()
    weights = spoil(monkeypatch, {3}, math.nan)
    run = training_run("llama", "lora", {"evaluation": {"holdout": 0.0}}, **{**KNOBS, "accumulation": 1})
    assert attempt(run) == 0
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert moved == [step != 3 for step in range(1, 7)]
    assert [math.isfinite(step["loss"] if step["loss"] is not None else math.nan) for step in events(run, "step")] == [
        step != 3 for step in range(1, 8)
    ]
    (warn,) = [event for event in events(run, "warning") if "left out" in event["what"]]
    assert "step 3 is not finite" in warn["what"]
    assert {int(state["step"]) for state in Guarded.latest.state.values()} == {6}


def test_a_bad_step_costs_the_next_one_no_checkpoint(training_run, late, monkeypatch):
    late()
    spoil(monkeypatch, {3, 6}, math.nan)
    recipe = {"evaluation": {"holdout": 0.0}, "checkpoint": {"every": 2}}
    knobs = {**KNOBS, "accumulation": 1, "checkpoint_every": 2}
    run = training_run("llama", "lora", recipe, **knobs)
    assert attempt(run) == 0
    kept = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert kept[-2:] == ["step-000004", "step-000007"]  # none after step 6, which was bad itself


@pytest.mark.parametrize("told_late", [False, True])
def test_a_checkpoint_that_was_asked_for_in_a_bad_step_is_written_after_the_next(
    training_run, late, monkeypatch, told_late
):
    if told_late:
        late()
    recipe = {"evaluation": {"holdout": 0.0}, "checkpoint": {"every": 99}}
    run = training_run("llama", "lora", recipe, **KNOBS)
    compute = TokenMeanTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        if self.state.global_step != 2:
            return loss
        run.request("checkpoint")
        return loss * math.nan

    monkeypatch.setattr(TokenMeanTrainer, "compute_loss", compute_loss)
    assert attempt(run) == 0
    assert [event["step"] for event in events(run, "checkpoint")] == [1, 4, 7]
    assert not run.requested("checkpoint")


def test_an_update_whose_loss_explodes_is_left_out(training_run, late, monkeypatch):
    late()
    weights = spoil(monkeypatch, {10}, 40.0)
    recipe = {"evaluation": {"holdout": 0.0}, "limits": {"explosion": 5.0}}
    run = training_run("llama", "lora", recipe, **{**KNOBS, "accumulation": 1, "steps": 12})
    assert attempt(run) == 0
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert moved == [step != 10 for step in range(1, 12)]
    (warn,) = [event for event in events(run, "warning") if "left out" in event["what"]]
    assert warn["what"].startswith("the loss of step 10 rose from")


def test_too_many_in_a_row_end_the_run(training_run, late, monkeypatch):
    late()
    spoil(monkeypatch, set(range(3, 99)), math.nan)
    recipe = {"evaluation": {"holdout": 0.0}, "limits": {"nan_steps": 2}}
    run = training_run("llama", "lora", recipe, **{**KNOBS, "accumulation": 1})
    assert attempt(run) != 0
    (failure,) = events(run, "failure")
    assert "not finite for 2 steps in a row, up to step 4" in failure["message"]
