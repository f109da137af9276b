"""What a trainer asks of a model in every step, asked of less."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from finetui.engine.trainers.walks import shorten_walks
from finetui.engine.worker import attempt


def model():
    torch.manual_seed(0)
    return torch.nn.ModuleList(
        [torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 128, bias=True), torch.nn.Linear(128, 64, bias=False)]
    )


def test_shorter_walks_do_the_same():
    layers = model()
    shorten_walks(layers, list(layers.parameters()))
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    layers.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in layers.parameters())
    layers.zero_grad()
    assert all(p.grad is None for p in layers.parameters())
    layers.eval()
    assert not layers[0].training
    assert layers.train() is layers
    assert layers[0].training
    layers.train(False)
    assert not layers[0].training


def test_the_first_walk_reaches_what_a_wrapper_says_nothing_of():
    """PEFT's wrapper begins in training mode, the base in it as transformers loads it: in evaluation mode."""
    wrapper = torch.nn.Sequential(model().eval())
    assert wrapper.training
    shorten_walks(wrapper, list(wrapper.parameters()))
    wrapper.train()
    assert all(module.training for module in wrapper.modules())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_stock_layers_are_computed_again_in_every_step_of_a_run(training_run, monkeypatch, tuning):
    forward, seen = LlamaMLP.forward, []  # of a part: how a layer's own is wrapped is transformers' affair

    def counted(self, *args, **kwargs):
        seen.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    counts = []
    for checkpointing in ("none", "full"):
        run = training_run(tuning=tuning, steps=3, checkpointing=checkpointing, recipe={"evaluation": {"holdout": 0.0}})
        assert attempt(run) == 0
        counts.append(sum(seen))
        seen.clear()
    layers = 2
    assert counts[1] - counts[0] == 3 * layers
