"""The faster of two ways: what is timed, what is decided, and that both ways give the numbers of the architecture."""

from __future__ import annotations

import pytest
import torch

from finetui.kernels import faster, launch, layers, lora_glu, selfcheck
from finetui.kernels.decoder_layer import Keeping
from finetui.kernels.patch import patch_model

from .test_decoder_layer import gradients, model, same

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize("policy", ["inputs", "all-but-elementwise"])
def test_both_ways_give_the_same_gradients(device, monkeypatch, fuses, policy):
    calls = []
    stock_backward = lora_glu.backward
    monkeypatch.setattr(lora_glu, "backward", lambda *a: calls.append(1) or stock_backward(*a))
    monkeypatch.setattr(faster, "gated_unit", lambda *_: selfcheck.Verdict(fuses, "slower"))
    adapted = model(device)
    expected = gradients(adapted)
    report = patch_model(adapted, only=["decoder_layer"], keeping=Keeping(policy))
    assert all(item.replaced for item in report.items), report.summary()
    calls.clear()
    same(gradients(adapted), expected)
    assert len(calls) == (2 if fuses else 0)


def test_other_ranks_are_not_even_timed(device):
    one, other = (layers.Projection(torch.empty(8, 4), None, rank) for rank in (4, 8))
    assert not layers._unit_pays([one, other], torch.float32, device, "silu")
    assert not layers._unit_pays([layers.Projection(torch.empty(8, 4))] * 2, torch.float32, device, "silu")


@pytest.mark.parametrize(
    ("ask", "known", "more"),
    [(faster.gated_unit, faster._gated_unit, ["silu"]), (faster.sum_first, faster._sum_first, [])],
    ids=["gated unit", "sum first"],
)
@pytest.mark.parametrize(("times", "ok"), [([1.0, 2.0], True), ([2.0, 1.0], False), ([0.99, 1.0], False)])
def test_the_clear_winner_is_taken_and_both_times_are_told(monkeypatch, ask, known, more, times, ok):
    left = list(times)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(faster, "_milliseconds", lambda run, device: left.pop(0))
    known.cache_clear()
    verdict = ask(torch.device("cpu"), torch.float32, 64, 4, *more)
    known.cache_clear()
    assert verdict.ok is ok
    assert verdict.why == f"{times[0]:.3f} ms fused, {times[1]:.3f} ms as separate operations"


@pytest.mark.skipif(launch.INTERPRETED, reason="time says nothing under the interpreter")
def test_a_gpu_gives_times(device):
    faster._gated_unit.cache_clear()
    assert "ms fused" in faster.gated_unit(device, torch.bfloat16, 1024, 16, "silu").why
