"""The arithmetic of PPO against its definitions."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch

from finetui.engine.trainers.gae import (
    KlControl,
    advantages,
    clipped_policy_loss,
    clipped_value_loss,
    whitened,
)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0)])
def test_advantages_are_the_sum_that_defines_them(discount: float, gae_lambda: float) -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    lengths = [5, 2, 1]
    mask = torch.tensor([[float(t < n) for t in range(5)] for n in lengths])
    found, returns = advantages(rewards, values, mask, discount=discount, gae_lambda=gae_lambda)
    for row, n in enumerate(lengths):
        after = [*values[row, :n].tolist(), 0.0]
        deltas = [rewards[row, t].item() + discount * after[t + 1] - after[t] for t in range(n)]
        expected = [sum((discount * gae_lambda) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        assert found[row].tolist() == pytest.approx([*expected, *[0.0] * (5 - n)])
        assert returns[row, :n].tolist() == pytest.approx([a + v for a, v in zip(expected, after, strict=False)])


def test_the_clip_binds_where_it_lowers_the_objective() -> None:
    old = torch.zeros(1, 4)
    logps = torch.tensor([[0.5, 0.5, -0.5, -0.5]], requires_grad=True)
    advantage, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4)
    loss, bound = clipped_policy_loss(logps, old, advantage, mask, 0.2)
    up, down = torch.tensor(0.5).exp().item(), torch.tensor(-0.5).exp().item()
    assert loss[0].tolist() == pytest.approx([-1.2, up, -down, 0.8])
    assert bound[0].tolist() == [1, 0, 0, 1]
    loss.sum().backward()
    assert [bool(g) for g in logps.grad[0].tolist()] == [False, True, True, False]


def test_values_are_held_near_what_they_were() -> None:
    old, returns, mask = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)
    loss = clipped_value_loss(torch.tensor([[0.5, 0.5]]), old, returns, mask, 0.2)
    assert loss[0].tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 1.5**2])


def test_whitening_leaves_out_padding() -> None:
    x, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 6.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    sums = ((x * mask).sum(), (x**2 * mask).sum(), mask.sum())
    white = whitened(x, mask, sums)
    real = white[mask.bool()]
    assert white[~mask.bool()].tolist() == [0, 0]
    assert real.mean().item() == pytest.approx(0, abs=1e-6)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_beta_is_steered_to_the_target() -> None:
    control = KlControl(0.1, target=2.0, horizon=1000)
    control.update(10.0, 100)
    assert control.beta == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    control.update(0.0, 100)
    assert control.beta == pytest.approx(0.102 * (1 - 0.2 * 0.1))
    fixed = KlControl(0.1)
    fixed.update(10.0, 100)
    assert fixed.beta == 0.1
