"""How grpo, rloo and ppo generate and judge answers: the sections ``rollout`` and ``rewards`` of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from .policy_loss import PolicyLossName, check_policy_loss
from .section import Auto, Section

if TYPE_CHECKING:
    from .recipe import Recipe

ROLLOUT_METHODS: frozenset[str] = frozenset({"grpo", "rloo", "ppo"})
#: Rewards that finetui ships, and the options that act on each.
SHIPPED_REWARDS: dict[str, frozenset[str]] = {
    "exact-answer": frozenset({"column"}),
    "numeric": frozenset({"column", "tolerance"}),
    "regex": frozenset({"pattern"}),
    "json-schema": frozenset({"column", "json_schema"}),
    "python-tests": frozenset({"column", "seconds", "memory_mib"}),
}
#: Options that act on a function of the user's.
OPTIONS_OF_FUNCTIONS: frozenset[str] = frozenset({"memory_mib", "network", "environment"})
_COLUMN = {"json-schema": "schema", "python-tests": "tests"}
#: Longest completion where the recipe leaves it open: TRL's, or half of a short sequence.
_COMPLETION = 512
#: Weight of KL against the reference where the recipe leaves it open: TRL's of grpo and rloo; ppo's of Ziegler et al.
_BETA = {"grpo": 0.0, "rloo": 0.05, "ppo": 0.05}

_ACTS_ON: dict[str, frozenset[str]] = {
    "loss": frozenset({"grpo"}),
    "scale_rewards": frozenset({"grpo"}),
    "gae_lambda": frozenset({"ppo"}),
    "discount": frozenset({"ppo"}),
    "value_weight": frozenset({"ppo"}),
    "value_clip": frozenset({"ppo"}),
    "value_learning_rate": frozenset({"ppo"}),
    "kl_target": frozenset({"ppo"}),
    "epsilon_high": frozenset({"grpo", "rloo"}),
    **dict.fromkeys(
        ("importance", "delta", "sapo_temperatures", "vespo_weights", "top_entropy", "entropy_bonus",
         "off_policy_limit", "unbiased_kl", "separate_rewards"),
        frozenset({"grpo"}),
    ),
    "server": frozenset({"grpo", "rloo"}),
}  # fmt: skip


class Reward(Section):
    """One judge of completions. A recipe may also write its function alone: ``rewards: [numeric, ./mine.py:score]``."""

    function: str
    """``exact-answer``, ``numeric``, ``regex``, ``json-schema``, ``python-tests``, or ``path.py:function``."""
    weight: float = 1.0
    """Its share in the sum of all rewards."""
    column: str | None = None
    """Column of the data to compare with; by default ``answer``, of json-schema ``schema``, of python-tests
    ``tests``. To exact-answer and numeric it gives one right answer, or a list of which any will do."""
    pattern: str | None = None
    """Regular expression that regex looks for."""
    json_schema: dict[str, Any] | None = None
    """Schema for all rows, instead of one per row in a column."""
    tolerance: float = Field(1e-6, ge=0.0)
    """Relative error that numeric forgives."""
    seconds: float = Field(10.0, gt=0.0)
    """Time for the tests of one completion (python-tests)."""
    memory_mib: int = Field(1024, ge=128)
    """Memory for the tests of one completion (python-tests); of a function of yours, for its process: 16384 unless
    set."""
    network: bool = False
    """Let a function of yours open connections, as to a model that judges."""
    environment: list[str] = Field([])
    """Variables with secrets that a function of yours gets, by name (``[OPENAI_API_KEY]``); it gets no others."""
    timeout_s: float = Field(300.0, gt=0.0)
    """Time for one batch; a reward that takes longer is stopped, and its completions count for nothing."""

    @property
    def name(self) -> str:
        """As metrics call it: the function's own name."""
        return self.function.rpartition(":")[2] or self.function


class Rollout(Section):
    """How answers are generated, and how the policy is moved by their rewards."""

    num_generations: Auto | int = "auto"
    """Completions per prompt; ``auto`` is 8, for ppo 1. A step's batch counts completions."""
    max_completion_length: Auto | int = "auto"
    """Longest completion in tokens; ``auto`` is 512, or half of a shorter sequence_length."""
    temperature: float = Field(1.0, gt=0.0)
    """Randomness of sampling; the loss divides logits by it too."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Sample from the likeliest words that add up to this probability."""
    top_k: int = Field(0, ge=0)
    """Sample from so many of the likeliest words; 0 from all."""
    min_p: float = Field(0.0, ge=0.0, lt=1.0)
    """Leave out words less likely than this share of the likeliest one's probability (arXiv:2407.01082)."""
    repetition_penalty: float = Field(1.0, gt=0.0)
    """Above 1, words that have been said become less likely (arXiv:1909.05858)."""
    beta: Auto | float = "auto"
    """Weight of KL against the model that training began with; ``auto`` is 0 for grpo, 0.05 for rloo and ppo."""
    epsilon: float = Field(0.2, gt=0.0)
    """How far an update may move the probability of a word, as a share."""
    epsilon_high: Auto | Annotated[float, Field(gt=0.0)] = "auto"
    """grpo, rloo: the same upwards alone, so that rare words may grow: DAPO takes 0.28 (arXiv:2503.14476). ``auto`` is
    epsilon. Of cispo the largest ratio of new to old probability itself; ``auto`` is then 5 (arXiv:2510.13786)."""
    delta: float | None = Field(None, gt=1.0)
    """grpo: largest ratio of new to old probability that counts against a bad completion, so that no word can blow up
    an update (two-sided clipping, arXiv:2505.07291). Above 1 + epsilon_high."""
    importance: Auto | Literal["token", "sequence"] = "auto"
    """grpo: compare new and old probability word by word, or of the whole completion (GSPO, arXiv:2507.18071, with
    epsilon 3e-4 and epsilon_high 4e-4). ``auto`` is token, for luspo sequence."""
    num_iterations: Auto | int = "auto"
    """Updates per batch of completions; ``auto`` is 1, for ppo 4."""
    loss: Auto | PolicyLossName = "auto"
    """What grpo minimises (TRL's loss_type): how it bounds an update, and how it averages over words and completions.
    ``auto`` is dapo (arXiv:2503.14476), or grpo (arXiv:2402.03300) with importance: sequence. dr_grpo
    (arXiv:2503.20783) and bnpo average otherwise; cispo (arXiv:2506.13585), sapo (arXiv:2511.20347), luspo
    (arXiv:2602.05261) and vespo (arXiv:2602.10693) also bound otherwise."""
    sapo_temperatures: list[Annotated[float, Field(gt=0.0)]] = Field([1.0, 1.05], min_length=2, max_length=2)
    """sapo: how fast a word stops counting as its probability moves, of good and of bad completions."""
    vespo_weights: list[Annotated[float, Field(ge=0.0)]] = Field([2.0, 3.0, 3.0, 2.0], min_length=4, max_length=4)
    """vespo: exponent and decay of the weight of good completions, and of bad ones."""
    top_entropy: float = Field(1.0, gt=0.0, le=1.0)
    """grpo: train on this share of the words alone, those where the model was least sure; 0.2 in arXiv:2506.01939."""
    entropy_bonus: float = Field(0.0, ge=0.0)
    """grpo: weight of the mean entropy of the trained words, which is subtracted from the loss so that answers stay
    diverse."""
    off_policy_limit: Annotated[float, Field(gt=0.0)] | None = None
    """grpo: leave out bad completions that have become less likely by more than so much (the mean over words of the
    logarithm of old over new probability, arXiv:2512.02556)."""
    unbiased_kl: bool = False
    """grpo: weigh the KL of each word by the ratio of new to old probability (arXiv:2512.02556)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What grpo divides advantages by: the spread within a prompt's completions, within the batch, or nothing."""
    separate_rewards: bool = False
    """grpo: normalise each reward over a prompt's completions before they are summed, so that none drowns the others
    (GDPO, arXiv:2601.05242)."""
    mask_truncated: bool = False
    """Leave completions that were cut off out of the loss."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What generates; ``auto`` is vLLM where it is installed, there is a GPU with room for its copy of the model, and
    the weights are in 16 bits."""
    server: str = Field("", pattern=r"^(https?://\S+)?$")
    """Address of a ``vllm serve`` on other GPUs that generates, such as http://localhost:8000; by default vLLM shares
    the GPUs of training."""
    gae_lambda: float = Field(0.95, ge=0.0, le=1.0)
    """Weight of longer returns in ppo's advantages (arXiv:1506.02438)."""
    discount: float = Field(1.0, gt=0.0, le=1.0)
    """Worth of the next token's reward against this one's, in ppo."""
    value_weight: float = Field(0.1, ge=0.0)
    """Weight of the value head's loss in ppo."""
    value_learning_rate: float = Field(1e-4, gt=0.0)
    """Peak learning rate of ppo's value head, which begins at 0."""
    value_clip: float = Field(0.2, gt=0.0)
    """How far ppo lets a value move in one update."""
    kl_target: float | None = Field(None, gt=0.0)
    """KL per completion that ppo steers to by changing beta; without it beta stays (arXiv:1909.08593)."""


@dataclass(frozen=True)
class Rollouts:
    """The section with no ``auto`` left, as far as more than a copy of it is needed."""

    num_generations: int
    max_completion_length: int
    beta: float
    num_iterations: int


def rollouts(recipe: Recipe, sequence_length: int) -> Rollouts:
    """What a recipe of a method that generates comes to, given its plan's sequence length."""
    asked, ppo = recipe.rollout, recipe.method == "ppo"
    longest = asked.max_completion_length
    return Rollouts(
        num_generations=(1 if ppo else 8) if asked.num_generations == "auto" else asked.num_generations,
        max_completion_length=min(_COMPLETION, sequence_length // 2) if longest == "auto" else longest,
        beta=_BETA[recipe.method] if asked.beta == "auto" else asked.beta,
        num_iterations=(4 if ppo else 1) if asked.num_iterations == "auto" else asked.num_iterations,
    )


def sequences_per_row(recipe: Recipe) -> int:
    """Trained sequences that one row of data gives in one pass: each completion counts once per update on it."""
    if recipe.method not in ROLLOUT_METHODS:
        return 1
    settled = rollouts(recipe, 2 * _COMPLETION)
    return settled.num_generations * settled.num_iterations


def group_size(recipe: Recipe) -> int:
    """Completions that a step's batch has to hold a multiple of: those of one prompt."""
    if recipe.method not in ROLLOUT_METHODS:
        return 1
    return rollouts(recipe, 2 * _COMPLETION).num_generations


def column_of(reward: Reward) -> str:
    """The column that a shipped reward compares with."""
    return reward.column or _COLUMN.get(reward.function, "answer")


def absolute_reward(value: Any, base: Path) -> Any:
    """A reward as a recipe writes it, its file's path made absolute."""
    if isinstance(value, dict):
        return {**value, "function": absolute_reward(value.get("function"), base)}
    path, colon, name = str(value).rpartition(":")
    if not isinstance(value, str) or not colon or not path.endswith(".py") or path.startswith(("/", "~")):
        return value
    return f"{(base / path).resolve()}:{name}"


def check_rollout(recipe: Recipe) -> None:
    """Refuse options without effect, rewards that do not exist, and batches that hold no whole group.

    Raises:
        ValueError: ``what||do``, as validators of a recipe raise it.
    """
    method, asked = recipe.method, recipe.rollout
    if method not in ROLLOUT_METHODS:
        section = "rewards" if recipe.rewards else "rollout" if asked.model_fields_set else ""
        if section:
            raise ValueError(f"{section} has no effect when method is {method}||Remove it, or use grpo, rloo or ppo.")
        return
    useless = sorted(name for name in asked.model_fields_set if name in _ACTS_ON and method not in _ACTS_ON[name])
    if useless:
        raise ValueError(f"rollout.{useless[0]} has no effect when method is {method}||Remove it.")
    if method == "ppo" and asked.engine == "vllm":
        raise ValueError("ppo's model has a value head, which vLLM's has not||Remove rollout.engine.")
    if asked.server and asked.engine == "transformers":
        raise ValueError("rollout.server has no effect when rollout.engine is transformers||Remove one of the two.")
    for reward in recipe.rewards:
        _check_reward(reward)
    names = [reward.name for reward in recipe.rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two rewards are called {twice[0]}, so their figures can't be told apart||Rename one.")
    settled = rollouts(recipe, 2 * _COMPLETION)
    fewest = 1 if method == "ppo" else 2
    if settled.num_generations < fewest:
        raise ValueError(f"{method} compares completions of one prompt||Set rollout.num_generations to 2 or more.")
    if settled.num_iterations < 1 or settled.max_completion_length < 1:
        raise ValueError("rollout.num_iterations and max_completion_length are at least 1||Use 1 or more.")
    if method == "grpo":
        check_policy_loss(asked, settled.beta, settled.num_iterations)
    if recipe.batch_size != "auto" and recipe.batch_size % settled.num_generations:
        what = f"batch_size {recipe.batch_size} is no multiple of the {settled.num_generations} completions per prompt"
        near = max(recipe.batch_size // settled.num_generations, 1) * settled.num_generations
        raise ValueError(f"{what}||Use batch_size: {near}, or another rollout.num_generations.")


def _check_reward(reward: Reward) -> None:
    given = reward.model_fields_set - {"function", "weight", "timeout_s"}
    if reward.function not in SHIPPED_REWARDS:
        path, colon, name = reward.function.rpartition(":")
        if not colon or not path.endswith(".py") or not name.isidentifier():
            known = ", ".join(SHIPPED_REWARDS)
            raise ValueError(f"there is no reward {reward.function!r}||Use {known}, or path.py:function.")
        useless = sorted(given - OPTIONS_OF_FUNCTIONS)
    else:
        useless = sorted(given - SHIPPED_REWARDS[reward.function])
    if useless:
        raise ValueError(f"{useless[0]} has no effect on the reward {reward.function}||Remove it.")
    if reward.function == "regex":
        if reward.pattern is None:
            raise ValueError("the reward regex needs a pattern||Write {function: regex, pattern: '…'}.")
        try:
            re.compile(reward.pattern)
        except re.error as error:
            raise ValueError(f"the pattern of the reward regex is wrong ({error})||Mend it.") from None
