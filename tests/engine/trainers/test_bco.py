"""BCO: its loss beside the formula, written out answer by answer in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("trl")
import torch
from torch import Tensor

from finetui.engine.run import Run
from finetui.engine.trainers.bco import BinaryTrainer
from finetui.engine.worker import attempt

from .conftest import events

BETA, GOOD_WEIGHT, BAD_WEIGHT = 0.5, 1.0, 2.0


def likelihoods(model: Any, inputs: dict[str, Any]) -> list[float]:
    """log π of each answer, from the logits of the whole model."""
    ids, answers = inputs["input_ids"], inputs["completion_mask"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1].double()
    chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (chosen * answers[:, 1:]).sum(1).tolist()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_loss_is_that_of_the_paper(
    method_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tuning: str
) -> None:
    told: list[tuple[float, list[tuple[float, bool]]]] = []
    stock = BinaryTrainer.loss_of

    def listened(trainer: Any, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        policy = likelihoods(model, inputs)
        if trainer.ref_model is not None:
            base = likelihoods(trainer.ref_model, inputs)
        else:
            with trainer.accelerator.unwrap_model(model).disable_adapter():
                base = likelihoods(model, inputs)
        labels = [bool(label) for label in inputs["label"]]
        loss = stock(trainer, model, inputs, num_items)
        rewards = [BETA * (now - then) for now, then in zip(policy, base, strict=True)]
        told.append((float(loss.detach()), list(zip(rewards, labels, strict=True))))
        return loss

    monkeypatch.setattr(BinaryTrainer, "loss_of", listened)
    preference = {"loss": "bco", "beta": BETA, "undesirable_weight": BAD_WEIGHT}
    run = method_run("kto", tuning, {"preference": preference}, accumulation=2)
    assert attempt(run) == 0, run.events_path.read_text()
    assert len(told) == 12
    seen: list[tuple[float, bool]] = []
    deltas = []
    for loss, answers in told:
        seen += answers
        means = [_mean([reward for reward, good in seen if good is kind]) for kind in (True, False)]
        delta = sum(mean for mean in means if mean is not None) / sum(mean is not None for mean in means)
        deltas.append(delta)
        losses = [
            GOOD_WEIGHT * _softplus(delta - reward) if good else BAD_WEIGHT * _softplus(reward - delta)
            for reward, good in answers
        ]
        assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert max(map(abs, deltas)) > 0.05, "good answers and bad ones have come to differ in reward"
    figures = [event["values"] for event in events(run, "metrics")]
    assert [values["delta"] for values in figures] == pytest.approx(
        [_mean(deltas[i : i + 2]) for i in range(0, 12, 2)], abs=1e-4
    )
    assert figures[-1]["rewards/margins"] > figures[0].get("rewards/margins", 0.0)


def test_answers_of_one_row_need_no_neighbours(method_run: Callable[..., Run]) -> None:
    run = method_run("kto", "lora", {"preference": {"loss": "bco"}, "micro_batch": 1}, micro_batch=1, steps=2)
    assert attempt(run) == 0, run.events_path.read_text()
    assert len(events(run, "step")) == 2


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
