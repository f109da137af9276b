"""The arithmetic of PPO: advantages, clipped losses, and a coefficient that steers KL (pure functions of tensors).

All tensors are ``[completions, length]`` over completion tokens, padded on the right; ``mask`` is 1 on real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that values should have been (Schulman et al., arXiv:1506.02438).

    delta_t = r_t + discount V_{t+1} - V_t;  A_t = sum_k (discount lambda)^k delta_{t+k};  R_t = A_t + V_t. An episode
    ends with its last real token: V beyond it is 0.
    """
    mask = mask.to(rewards.dtype)
    later = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(later)
    found = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        later = here * (delta + discount * gae_lambda * later)
        next_value = here * values[:, t]
        found.append(later)
    estimated = torch.stack(found[::-1], dim=1)
    return estimated, (estimated + values) * mask


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens; 0 without any."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whitened(x: Tensor, mask: Tensor, sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """``x`` at mean 0 and variance 1 over the real tokens of all ranks.

    Args:
        sums: over all ranks, of x, of its squares, and of real tokens.
    """
    total, squares, count = sums
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean**2).clamp(min=0)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def clipped_policy_loss(
    logps: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """``-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)`` per token, rho = e^(logps - old), and where the clip binds
    (Schulman et al., arXiv:1707.06347, eq. 7)."""
    ratio = torch.exp((logps - old) * mask)
    free, held = ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
    return -torch.min(free, held) * mask, (held < free) * mask


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half of the larger squared error of the value and of the value kept within ``clip`` of what it was, per token."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2) * mask


@dataclass
class KlControl:
    """The weight of KL: fixed, or steered to a target per completion (Ziegler et al., arXiv:1909.08593, 2.2).

    With a target, beta grows by up to 20% x completions / ``horizon`` when KL is above it, and falls when below.
    """

    beta: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, completions: int) -> None:
        """Take in the mean KL of so many completions."""
        if self.target is not None:
            error = max(-0.2, min(0.2, kl / self.target - 1))
            self.beta *= 1 + error * completions / self.horizon
