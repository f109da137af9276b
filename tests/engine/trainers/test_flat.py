"""Many tensors updated as one: the same numbers, and the model's parameters stay what they were."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

from finetui.engine.trainers.flat import BLOCK, SMALLEST, flatten, shorten_walks
from finetui.engine.worker import attempt


def model():
    torch.manual_seed(0)
    return torch.nn.ModuleList(
        [torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 128, bias=True), torch.nn.Linear(128, 64, bias=False)]
    )


def steps(layers, optimizer, n, dead=()):
    for step in range(n):
        for i, p in enumerate(layers.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = None if i in dead else torch.randn(p.shape, generator=generator)
        optimizer.step()
        layers.zero_grad()
    return [p.detach().clone() for p in layers.parameters()]


def test_the_steps_are_those_of_separate_tensors():
    plain, joined = model(), model()
    optimizer = torch.optim.AdamW(joined.parameters(), lr=0.1, weight_decay=0.1)
    assert flatten(optimizer) == 3
    assert [p.numel() for p in optimizer.param_groups[0]["params"]] == [4096 + 2 * 8192, 128]
    expected = steps(plain, torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.1), 3)
    for got, wanted in zip(steps(joined, optimizer, 3), expected, strict=True):
        assert torch.equal(got, wanted)


def test_without_any_gradient_nothing_moves():
    layers = model()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1, weight_decay=0.1)
    flatten(optimizer)
    before = [p.detach().clone() for p in layers.parameters()]
    after = steps(layers, optimizer, 1, dead=range(4))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_state_survives_a_restart():
    first, second = model(), model()
    a = torch.optim.AdamW(first.parameters(), lr=0.1)
    flatten(a)
    steps(first, a, 2)
    second.load_state_dict(first.state_dict())
    b = torch.optim.AdamW(second.parameters(), lr=0.1)
    flatten(b)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for got, wanted in zip(steps(second, b, 2), steps(first, a, 2), strict=True):
        assert torch.equal(got, wanted)


def test_the_parameters_can_be_written_and_read(tmp_path):
    layers = model()
    flatten(torch.optim.AdamW(layers.parameters()))
    save_file(layers.state_dict(), tmp_path / "x.safetensors")
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, layers.state_dict()[name])
    assert (tmp_path / "x.safetensors").stat().st_size < 4 * sum(p.numel() for p in layers.parameters()) + 1000


def test_tensors_that_would_change_their_blocks_stay_alone():
    layers = torch.nn.ParameterList(
        [torch.zeros(SMALLEST), torch.zeros(SMALLEST + BLOCK), torch.zeros(SMALLEST - BLOCK), torch.zeros(SMALLEST + 1)]
    )
    layers.append(torch.nn.Parameter(torch.zeros(SMALLEST, dtype=torch.bfloat16)))
    optimizer = torch.optim.AdamW(layers.parameters())
    assert flatten(optimizer) == 2
    assert len(optimizer.param_groups[0]["params"]) == 4


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


def test_gradients_that_lie_end_to_end_are_taken_as_they_are():
    parameters = [torch.nn.Parameter(torch.ones(4096)), torch.nn.Parameter(torch.ones(2, 4096))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    assert flatten(optimizer) == 2
    (whole,) = optimizer.param_groups[0]["params"]
    memory = torch.arange(4 * 4096.0)
    parameters[0].grad, parameters[1].grad = memory[4096:8192], memory[8192:].view(2, 4096)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(whole.grad.data_ptr()))
    optimizer.step()
    assert seen == [memory[4096:].data_ptr()]
    assert torch.equal(whole.detach(), 1 - memory[4096:])
    parameters[0].grad, parameters[1].grad = memory[:4096], memory[8192:].view(2, 4096)  # with a gap
    optimizer.step()
    assert seen[1] not in (memory.data_ptr(), seen[0])
    assert torch.equal(parameters[1].detach().view(-1), 1 - 2 * memory[8192:])
