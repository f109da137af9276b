"""Training methods as terms: how many sequences one example is, which further models are held, what else is computed.

Read in trl 1.16 (``trl/trainer/*.py``, ``trl/experimental/*``). Methods of its stable trainers project hidden states
tile by tile and never hold all logits, as SFTTrainer does; those of its experimental ones (ORPO, CPO, and SimPO, which
is CPO with another loss) hold the logits of both halves of a pair, and finetui's own do not. The reference of an
adapter run is the base with its adapters off: no copy. PPO is finetui's own, on the machinery of TRL's GRPO.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from .stacks import STACKS, Stack


@dataclass(frozen=True)
class MethodTerms:
    """What a method adds to plain supervised training."""

    name: str
    title: str
    sequences: int = 1
    """Sequences per example in one forward pass: 2 where chosen and rejected answers are concatenated."""
    reference: bool = False
    """Log-probabilities of a frozen reference: a copy of the model in full fine-tuning, and one more forward pass."""
    forwards: int = 0
    """Further forward passes without gradients."""
    full_logits: bool = False
    """Logits of all tokens are held: 16-bit, their shifted half and their log-softmax."""
    scalar_head: bool = False
    """One score in place of the words' logits."""
    rollouts: bool = False
    """Answers are generated: a KV cache, and one pass over all weights per token."""
    rate: tuple[float, float] = (1e-6, 1e-5)
    """Usual learning rate of full fine-tuning (TRL's defaults) and of adapters (ten times that)."""
    source: str = ""


#: Completions are this long at most (``max_completion_length`` of GRPOConfig and RLOOConfig).
COMPLETION_TOKENS = 512

METHODS: dict[str, MethodTerms] = {
    terms.name: terms
    for terms in (
        MethodTerms("sft", "supervised fine-tuning", rate=(1e-5, 2e-4)),
        MethodTerms("pretrain", "continued pretraining", rate=(1e-5, 2e-4)),
        MethodTerms("distill", "distillation", rate=(1e-5, 2e-4), source="arXiv:2306.13649"),
        MethodTerms("dpo", "DPO", 2, reference=True, forwards=1, rate=(5e-7, 5e-5), source="arXiv:2305.18290"),
        MethodTerms("ipo", "IPO", 2, reference=True, forwards=1, rate=(5e-7, 5e-5), source="arXiv:2310.12036"),
        # The KL estimate runs policy and reference over mismatched answers too.
        MethodTerms("kto", "KTO", 1, reference=True, forwards=3, source="arXiv:2402.01306"),
        MethodTerms("orpo", "ORPO", 2, full_logits=True, source="arXiv:2403.07691"),
        MethodTerms("cpo", "CPO", 2, full_logits=True, source="arXiv:2401.08417"),
        MethodTerms("simpo", "SimPO", 2, full_logits=True, source="arXiv:2405.14734"),
        # beta is 0 by default: no reference (trl/trainer/grpo_config.py).
        MethodTerms("grpo", "GRPO", rollouts=True, source="arXiv:2402.03300"),
        MethodTerms("rloo", "RLOO", rollouts=True, reference=True, forwards=1, source="arXiv:2402.14740"),
        MethodTerms("ppo", "PPO", rollouts=True, reference=True, forwards=2, source="arXiv:1707.06347"),
        MethodTerms("reward", "reward model", 2, scalar_head=True, rate=(1e-5, 1e-4), source="arXiv:2203.02155"),
    )
}


@lru_cache(maxsize=64)
def stack_for(method: str, stack: Stack) -> Stack:
    """The stack with the loss that this method has there."""
    terms = METHODS[method]
    if stack.loss == "rows":  # the loss of whole examples needs no more; others ask for each word's probability
        tiles = STACKS["trl"]
        if method in ("sft", "pretrain", "distill"):
            return stack
        return replace(stack, loss="tiles", chunk_tokens=tiles.chunk_tokens, tile_words=tiles.tile_words)
    if terms.full_logits and stack.loss != "logits":
        return replace(stack, loss="logits", logit_forward=6.0, logit_backward=8.0)
    return stack
