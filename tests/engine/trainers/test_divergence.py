"""Steps that would spoil the weights, judged without a model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetui.engine.events import Warn
from finetui.engine.trainers.divergence import Divergence, explosion_of, rows_of_step
from finetui.engine.trainers.order import Order
from finetui.planner.errors import TrainingError
from finetui.planner.recipe import Recipe

ROWS = [{"input_ids": [number, number + 1]} for number in range(40)]


class Bench:
    """A trainer of two micro-batches of two rows, whose losses a test gives."""

    def __init__(self, explosion: float | None = 5.0, nan_steps: int = 2) -> None:
        self.told: list[Warn] = []
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trainer: Any = SimpleNamespace(
            order=Order(rows=40, steps=50, micro_batch=2, accumulation=2, seed=3),
            train_dataset=ROWS,
            processing_class=SimpleNamespace(decode=lambda tokens: f"text {tokens[0]}"),
            trained_parameters=lambda: [("w", self.weight)],
            training_step=lambda loss: torch.tensor(loss),
            grad_norm=1.0,
            late=False,
            args=SimpleNamespace(fp16=False, device=torch.device("cpu"), world_size=1),
        )
        self.watch = Divergence(self.trainer, self.told.append, explosion=explosion, nan_steps=nan_steps)
        self.done = 0

    def step(self, *losses: float, grad_norm: float = 1.0, fp16: bool = False) -> bool:
        """One optimiser step; whether its update is made."""
        self.trainer.args.fp16 = fp16
        state: Any = SimpleNamespace(global_step=self.done)
        for loss in losses:
            self.trainer.training_step(loss)
        self.weight.grad, self.trainer.grad_norm = torch.ones(1), grad_norm
        self.watch.on_pre_optimizer_step(self.trainer.args, state, None)  # type: ignore[arg-type]
        self.done += 1
        self.watch.judge(self.done, sum(losses), grad_norm)
        return self.weight.grad is not None


def test_an_explosion_is_held_against_the_median_of_good_steps() -> None:
    bench = Bench()
    assert all(bench.step(1.0, 1.0) for _ in range(7))
    assert bench.step(9.0, 9.0)  # too few steps to know what is usual
    assert bench.step(1.0, 5.9)  # 4.9 above the median of 2
    assert not bench.step(1.0, 6.1)
    assert [warn.what for warn in bench.told] == ["the loss of step 10 rose from 2.00 to 7.10: its update is left out"]
    assert bench.step(1.0, 1.0)  # a good step in between: the count begins anew
    assert not bench.step(1.0, 7.0)
    with pytest.raises(TrainingError, match="2 steps in a row, up to step 13") as caught:
        bench.step(1.0, 7.0)
    assert caught.value.cause == "nan"


def test_what_is_not_finite_is_named_by_the_rows_of_its_micro_batch() -> None:
    bench = Bench(nan_steps=3)
    bench.step(1.0, 1.0)
    bench.step(1.0, math.nan, grad_norm=math.nan)
    rows = rows_of_step(bench.trainer, 2)[1]
    (warn,) = bench.told
    assert warn.what == "the loss of step 2 is not finite: its update is left out"
    assert [part.split()[0] for part in warn.where.removeprefix("rows ").split("; ")] == [str(row) for row in rows]
    assert f"'text {rows[0]}'" in warn.where
    bench.step(1.0, 1.0, grad_norm=math.inf)  # no micro-batch is to blame alone
    assert "gradient of step 3" in bench.told[1].what
    assert bench.told[1].where.count(";") == 3


def test_a_scaler_that_looks_for_its_scale_is_no_news() -> None:
    bench = Bench()
    bench.step(1.0, 1.0, grad_norm=math.inf, fp16=True)
    assert not bench.told


def test_bad_steps_of_either_kind_are_counted_together() -> None:
    bench = Bench(nan_steps=3)
    assert all(bench.step(1.0, 1.0) for _ in range(9))
    assert not bench.step(1.0, 99.0)
    assert not bench.step(1.0, math.nan, grad_norm=math.nan)
    bench.step(1.0, 1.0, grad_norm=math.inf, fp16=True)  # neither good nor bad
    with pytest.raises(TrainingError, match="loss exploded or loss was not finite for 3 steps in a row, up to step 13"):
        bench.step(1.0, 99.0)


def test_without_a_limit_nothing_explodes() -> None:
    bench = Bench(explosion=None)
    assert all(bench.step(1.0 + 100.0 * (number > 20), 1.0) for number in range(30))
    assert not bench.told


def test_only_losses_in_nats_per_token_have_a_limit_by_themselves() -> None:
    assert explosion_of(Recipe.build({"model": "m"})) == 5.0
    assert explosion_of(Recipe.build({"model": "m", "method": "dpo"})) is None
    assert explosion_of(Recipe.build({"model": "m", "method": "dpo", "limits": {"explosion": 2.0}})) == 2.0
    assert explosion_of(Recipe.build({"model": "m", "limits": {"explosion": None}})) is None
