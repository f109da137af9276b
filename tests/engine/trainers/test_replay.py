"""Whole runs whose micro-batches are replayed: the losses are those of runs without, and so is the result."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from finetui.engine.trainers import sft
from finetui.engine.trainers.job import Job
from finetui.engine.trainers.replay import Replays, obstacle
from finetui.engine.worker import attempt

from ..conftest import RESOLVED
from .conftest import HostRecorder, events, losses


@pytest.fixture
def made(monkeypatch):
    """Trainers with our loss, which a run on the CPU does without; with replays if asked. Layers stay stock: only the
    interpreter could run ours here, and takes its time."""
    trainers: list[Any] = []
    stock = sft.sft_trainer
    replayed = [False]

    def trainer_of(job):
        trainer = stock(job)
        trainer.fuse_loss()
        assert obstacle(trainer, job.resolved, whole_layers=True) == ""
        if replayed[0]:
            trainer.replays = Replays(trainer, HostRecorder())
        trainers.append(trainer)
        return trainer

    monkeypatch.setattr(sft, "sft_trainer", trainer_of)
    monkeypatch.setattr(Job, "multiple_of", 64)  # few lengths, as on a GPU
    return SimpleNamespace(trainers=trainers, replayed=replayed)


@pytest.mark.parametrize("packing", [False, True])
def test_losses_and_figures_are_those_of_a_run_without(training_run, made, packing):
    knobs = {"steps": 4, "micro_batch": 1, "accumulation": 2, "packing": packing, "sequence_length": 64}
    recipe = {"packing": packing, "evaluation": {"every": 4, "holdout": 0.1}}
    plain = training_run("llama", "lora", recipe, **knobs)
    assert attempt(plain) == 0
    made.replayed[0] = True
    replayed = training_run("llama", "lora", recipe, **knobs)
    assert attempt(replayed) == 0
    graphs = made.trainers[-1].replays.graphs
    assert graphs.replays > 0
    assert graphs.given_up == ""
    assert losses(replayed) == pytest.approx(losses(plain), rel=1e-5)
    for kind, name in (("step", "grad_norm"), ("eval", "loss")):
        mine, theirs = ([event[name] for event in events(run, kind)] for run in (replayed, plain))
        assert mine == pytest.approx(theirs, rel=1e-4), kind
    figures = [[event["values"] for event in events(run, "metrics")] for run in (replayed, plain)]
    assert any("token_accuracy" in values for values in figures[0])
    assert figures[0] == figures[1]
    assert [step["tokens"] for step in events(replayed, "step")] == [step["tokens"] for step in events(plain, "step")]


def test_what_stands_in_the_way_is_said():
    config = SimpleNamespace(attention_dropout=0.0)
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)), fuses_loss=True,
        args=SimpleNamespace(world_size=1), numerics=SimpleNamespace(autocast=torch.bfloat16),
        weighting="nll",
    )  # fmt: skip
    resolved = dataclasses.replace(RESOLVED, dropout=0.0)
    assert obstacle(trainer, resolved, whole_layers=True) == ""
    assert "kernel" in obstacle(trainer, resolved, whole_layers=False)
    assert "dropout" in obstacle(trainer, dataclasses.replace(resolved, dropout=0.1), whole_layers=True)
    assert "host memory" in obstacle(trainer, dataclasses.replace(resolved, checkpointing="offload"), whole_layers=True)
    trainer.args.world_size = 2
    assert "ranks" in obstacle(trainer, resolved, whole_layers=True)
    trainer.args.world_size, trainer.numerics.autocast = 1, torch.float16
    assert "fp16" in obstacle(trainer, resolved, whole_layers=True)


@pytest.mark.cuda
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_cuda_graphs_train_as_launches_do(training_run, monkeypatch, tuning, packing, checkpointing):
    made: list[Any] = []
    stock = sft.sft_trainer
    monkeypatch.setattr(sft, "sft_trainer", lambda job: made.append(stock(job)) or made[-1])
    knobs = {
        "device": "cuda", "precision": "bf16", "kernels": "auto", "checkpointing": checkpointing, "steps": 8,
        "accumulation": 2, "micro_batch": 2, "packing": packing, "learning_rate": 3e-3,
    }  # fmt: skip
    plain, replayed = (training_run("llama", tuning, {"packing": packing}, graphs=on, **knobs) for on in (False, True))
    assert attempt(plain) == attempt(replayed) == 0
    graphs = made[-1].replays.graphs
    assert graphs.given_up == ""
    assert graphs.replays > 0
    assert made[-1].pool_bytes > 0
    assert not [event for event in events(replayed, "fallback") if "graphs" in event["what"]]
    assert losses(replayed) == pytest.approx(losses(plain), rel=2e-3)
    norms = [[step["grad_norm"] for step in events(run, "step")] for run in (replayed, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
