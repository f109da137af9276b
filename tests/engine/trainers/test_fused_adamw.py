"""When training gets the fused optimiser, and with which states."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetui.engine.trainers.fused_adamw import clipped_on_the_way, fused_adamw


def settings(optim="adamw_bnb_8bit", fp16=False):
    return SimpleNamespace(
        fp16=fp16,
        optim=SimpleNamespace(value=optim),
        learning_rate=1e-5,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        seed=7,
    )


def model(device="cpu", dtype=torch.bfloat16):
    return nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 128)).to(device, dtype)


def refuse(event):
    raise AssertionError(event)


def test_off_the_gpu_the_trainer_keeps_its_own():
    assert fused_adamw(model(), settings(), refuse) is None


@pytest.mark.cuda
@pytest.mark.parametrize(("optim", "states"), [("adamw_bnb_8bit", "8bit"), ("adamw_torch_fused", "bf16")])
def test_bf16_weights_on_a_gpu_get_it(optim, states):
    trained = model("cuda")
    kind, options = fused_adamw(trained, settings(optim), refuse)
    optimizer = kind(trained.parameters(), **options)
    for p in trained.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.defaults["states"] == states
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    if states == "8bit":
        assert optimizer.state[trained[0].weight]["exp_avg"].dtype == torch.float32, "an embedding in 8 bits"
        assert optimizer.state[trained[1].weight]["exp_avg"].dtype == torch.int8


@pytest.mark.cuda
@pytest.mark.parametrize(("optim", "dtype"), [("adamw_bnb_8bit", torch.int8), ("adamw_torch_fused", torch.float32)])
def test_fp32_weights_have_it_too(optim, dtype):
    trained = model("cuda", torch.float32)
    kind, options = fused_adamw(trained, settings(optim), refuse)
    optimizer = kind(trained.parameters(), **options)
    for p in trained.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[trained[1].weight]["exp_avg"].dtype == dtype


@pytest.mark.cuda
def test_other_weights_and_other_optimisers_do_not():
    wide = model("cuda", torch.float32)
    assert fused_adamw(wide, settings(), refuse, kernels=False) is None
    assert fused_adamw(wide, settings(fp16=True), refuse) is None
    wide[1].bfloat16()
    assert fused_adamw(wide, settings(), refuse) is None, "of two formats"
    assert fused_adamw(model("cuda"), settings("adafactor"), refuse) is None


@pytest.mark.cuda
def test_where_it_is_due_and_can_not_serve_an_event_says_so(monkeypatch):
    from finetui.kernels import adamw
    from finetui.kernels.selfcheck import Verdict

    monkeypatch.setattr(adamw, "prove", lambda device: Verdict(False, "it is wrong here"))
    told = []
    assert fused_adamw(model("cuda"), settings(), told.append) is None
    assert "it is wrong here" in str(told)


@pytest.mark.parametrize("size", [0.01, 10.0])
def test_gradients_are_clipped_where_they_are_read(size):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adamw = pytest.importorskip("finetui.kernels.adamw")
    apart, together = ([torch.ones(8, device=device).requires_grad_() for _ in range(2)] for _ in range(2))
    first, second = (adamw.AdamW(params, lr=0.1, states="fp32") for params in (apart, together))
    for one, other in zip(apart, together, strict=True):
        one.grad = size * torch.randn_like(one)
        other.grad = one.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(apart, 1.0)
    torch.testing.assert_close(clipped_on_the_way(SimpleNamespace(optimizer=second), together, 1.0), norm)
    first.step()
    second.step()
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other)


def test_other_optimisers_have_gradients_clipped_before():
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.full((3,), 9.0)
    assert clipped_on_the_way(torch.optim.AdamW([weight]), [weight], 1.0) is None
    assert weight.grad.tolist() == [9.0] * 3
