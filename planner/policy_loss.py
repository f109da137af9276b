"""What grpo minimises: the losses of its family, and which option of ``rollout`` acts on which of them.

With r the probability of a word (or, by ``importance: sequence``, the geometric mean of a completion's words) over what
it was when the completion was written, A the completion's advantage:

=========== ===================================================== =============================================
loss        per word                                              averaged over
=========== ===================================================== =============================================
grpo        −min(min(r, δ)·A, clip(r, 1−ε, 1+ε′)·A)               the words of each completion, then completions
dapo        the same                                              the words of the whole batch
bnpo        the same                                              the words of each micro-batch
dr_grpo     the same                                              completions × max_completion_length
luspo       the same                                              completions (a sum over the words of each)
cispo       −min(r, ε′)·A·log p, no gradient through min(r, ε′)   the words of the whole batch
sapo        −A·σ(τ·(r − 1))·4/τ, τ by the sign of A               as grpo
vespo       −A·φ(w)·log p, w the product of the words' ratios,    the words of the whole batch
            φ(w) = e^λ·w^k·e^(−λ·w), no gradient through it
=========== ===================================================== =============================================

ε is ``epsilon``, ε′ ``epsilon_high``, δ ``delta``, (τ₊, τ₋) ``sapo_temperatures``, (k₊, λ₊, k₋, λ₋) ``vespo_weights``.
Sources: the arXiv numbers at the options of :class:`.rollout.Rollout`; read in trl 1.15 and 1.16
(``trl/trainer/grpo_trainer.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .rollout import Rollout

PolicyLossName = Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
#: Losses that clip the ratio on both sides.
CLIPPED: frozenset[str] = frozenset({"grpo", "dapo", "dr_grpo", "bnpo", "luspo"})
#: Largest weight of a word in cispo where the recipe leaves it open: that of ScaleRL (arXiv:2510.13786), as in TRL.
_CISPO_CAP = 5.0

#: Options to the losses that they act on; an option that is not named acts on all.
_ACTS_ON: dict[str, frozenset[str]] = {
    "epsilon": CLIPPED,
    "epsilon_high": CLIPPED | {"cispo"},
    "delta": CLIPPED,
    "sapo_temperatures": frozenset({"sapo"}),
    "vespo_weights": frozenset({"vespo"}),
}
#: Options that change nothing while the ratio is 1, as it is in the first update on a batch of completions.
_NEED_UPDATES = ("delta", "sapo_temperatures", "vespo_weights", "unbiased_kl")


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of grpo with no ``auto`` left; ``epsilon_high`` is of cispo the largest ratio itself."""

    name: PolicyLossName
    importance: Literal["token", "sequence"]
    epsilon_high: float


def policy_loss(asked: Rollout) -> PolicyLoss:
    """What grpo minimises under these options."""
    name = asked.loss
    if name == "auto":  # averaged over all words, a long completion would weigh more, but here it has one ratio
        name = "grpo" if asked.importance == "sequence" else "dapo"
    importance = asked.importance
    if importance == "auto":
        importance = "sequence" if name == "luspo" else "token"
    high = asked.epsilon_high
    if high == "auto":
        high = _CISPO_CAP if name == "cispo" else asked.epsilon
    return PolicyLoss(name, importance, high)


def check_policy_loss(asked: Rollout, beta: float, updates: int) -> None:
    """Refuse options of grpo without effect on its loss.

    Args:
        beta: weight of KL.
        updates: on each batch of completions.

    Raises:
        ValueError: ``what||do``, as validators of a recipe raise it.
    """
    loss, given = policy_loss(asked), asked.model_fields_set
    useless = sorted(name for name in given if name in _ACTS_ON and loss.name not in _ACTS_ON[name])
    if useless:
        losses = ", ".join(sorted(_ACTS_ON[useless[0]]))
        raise ValueError(f"rollout.{useless[0]} has no effect on loss {loss.name}||Remove it; it is for {losses}.")
    if loss.name == "vespo" and asked.importance == "sequence":
        raise ValueError("vespo weighs whole completions by itself||Remove rollout.importance.")
    if loss.name == "luspo" and asked.importance == "token":
        raise ValueError("luspo compares whole completions||Remove rollout.importance.")
    early = [name for name in _NEED_UPDATES if name in given and getattr(asked, name) and updates == 1]
    if early:
        what = f"rollout.{early[0]} has no effect with one update per batch, before which nothing has moved"
        raise ValueError(f"{what}||Set rollout.num_iterations to 2 or more, or remove it.")
    if asked.off_policy_limit is not None and updates == 1 and asked.engine == "transformers":
        what = "rollout.off_policy_limit has no effect with one update per batch, written by the very model it is for"
        raise ValueError(f"{what}||Set rollout.num_iterations to 2 or more, or remove it.")
    if asked.delta is not None and asked.delta <= 1 + loss.epsilon_high:
        what = f"rollout.delta {asked.delta:g} would cut below 1 + epsilon_high, where clipping ends"
        raise ValueError(f"{what}||Set it above {1 + loss.epsilon_high:g}.")
    if asked.unbiased_kl and not beta:
        raise ValueError("rollout.unbiased_kl has no effect when beta is 0||Set rollout.beta, or remove it.")
    if asked.separate_rewards and "scale_rewards" in given:
        what = "rollout.scale_rewards has no effect with separate_rewards, which scales each reward by itself"
        raise ValueError(f"{what}||Remove one of the two.")
