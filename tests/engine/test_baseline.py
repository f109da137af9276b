"""The base model's figures: told after the first step where adapters can be switched off, before it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from finetui.engine.baseline import can_wait
from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.worker import attempt

MakeRun = Callable[..., Run]


def model(adapted: bool = True, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base: Any = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **options)) if adapted else base


def test_only_a_model_that_begins_as_its_base_can_be_asked_later() -> None:
    assert can_wait(model())
    assert not can_wait(model(adapted=False))
    assert not can_wait(model(modules_to_save=["lm_head"])), "the head is trained, and stays so with adapters off"
    assert not can_wait(model(init_lora_weights=False)), "its adapters do something from the start"
    begun = model()
    with torch.no_grad():
        next(p for name, p in begun.named_parameters() if "lora_B" in name).fill_(0.1)
    assert not can_wait(begun)


@pytest.mark.parametrize(("tuning", "first"), [("lora", "step"), ("full", "sample")])
def test_the_first_step_does_not_wait_where_it_need_not(training_run: MakeRun, tuning: str, first: str) -> None:
    run = training_run(tuning=tuning, steps=2)
    assert attempt(run) == 0, run.events_path.read_text()
    told = [event for event in read_events(run.events_path) if event.type in {"step", "eval", "sample"}]
    assert told[0].type == first
    begun = [event for event in told if event.type in {"eval", "sample"} and event.data["step"] == 0]
    assert {event.type for event in begun} == {"eval", "sample"}
    assert len([event for event in begun if event.type == "eval"]) == 1
    later = [event.seq for event in told if event.data["step"] > 1]
    assert max(event.seq for event in begun) < min(later)


def test_asking_the_base_leaves_training_as_it_was(training_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, unasked = training_run(steps=4), training_run(steps=4)
    assert attempt(asked) == 0
    monkeypatch.setattr("finetui.engine.baseline.can_wait", lambda _: False)
    assert attempt(unasked) == 0
    steps = [[(e.data["loss"], e.data["grad_norm"]) for e in read_events(run.events_path) if e.type == "step"]
             for run in (asked, unasked)]  # fmt: skip
    assert steps[0] == steps[1]
    evals = [[(e.data["step"], e.data["loss"]) for e in read_events(run.events_path) if e.type == "eval"]
             for run in (asked, unasked)]  # fmt: skip
    assert evals[0] == evals[1], "while B is zero, a model with its adapters off computes the same"
