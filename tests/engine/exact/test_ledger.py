"""Storages are entered once, in the allocator's blocks, and struck out when the last tensor on them is gone."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from finetui.engine.exact.ledger import Ledger


@pytest.fixture
def ledger():
    with FakeTensorMode(), Ledger() as made:
        yield made


def test_views_share_a_storage_and_blocks_are_512_bytes(ledger):
    x = torch.zeros(100)
    y = x.view(10, 10)[2:]
    assert ledger.total == 512
    z = x + 1
    assert ledger.total == 1024
    del x
    assert ledger.total == 1024  # y is still there
    del y, z
    assert ledger.total == 0


def test_what_autograd_saves_stays_until_backward_has_used_it(ledger):
    weight = torch.zeros(256, 256, requires_grad=True)
    kept = torch.zeros(256, 256, requires_grad=True)
    before = ledger.total
    out = (kept.exp() * weight).sum()  # exp keeps its answer, the product both factors
    block = 256 * 256 * 4
    assert ledger.total == before + block + 512
    out.backward()
    del out
    assert ledger.total == before + 2 * block  # the two gradients


def test_peaks_are_kept_by_moment_and_by_term(ledger):
    with ledger.during("first", "weights"):
        held = torch.zeros(1024)
    with ledger.during("second", "activations"):
        torch.zeros(2048)
        ledger.enter(held, "gradients")
    assert ledger.peaks["first"].terms == {"weights": 4096}
    assert ledger.peaks["second"].bytes == 4096 + 8192
    assert {term: size for term, size in ledger.live.items() if size} == {"gradients": 4096}


def test_values_are_never_asked_for(ledger):
    mask = torch.zeros(3, 4, dtype=torch.bool)
    assert bool(mask.all())
    assert torch.zeros(()).item() == 0.0
    assert torch.zeros(3, 4, 5)[mask].shape == (12, 5)


def test_gradients_of_two_uses_are_added_in_place_as_on_real_tensors(ledger):
    weight = torch.zeros(256, 256, requires_grad=True)
    block = 256 * 256 * 4
    loss = (weight.sin() + weight.cos()).sum()
    ledger.peaks.clear()
    with ledger.during("backward", "activations"):
        before = ledger.total
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    # Two gradients and, while the second is made, its factor: never the sum as a third.
    assert ledger.peaks["backward"].bytes <= before + 3 * block + 1024
    del loss
    assert ledger.total == 2 * block  # the weight and its gradient
