"""Learning from rewards: GRPO and RLOO by TRL's trainers, with the order, figures and checkpoints of a run.

A step trains on ``batch_size`` completions, all of them written by the policy as it was before the step (or
``num_iterations`` steps before). Random numbers, and completions that further steps will use, are part of a checkpoint,
so that a resumed run goes on with the very same ones.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from ...planner.errors import DataError, RecipeError
from ...planner.policy_loss import policy_loss
from ...planner.rollout import Rollout, Rollouts, rollouts
from ..events import Sample, Warn
from ..models.load import Emit
from ..output import set_generation
from ..rewards.judges import Judge, judges, plain_text
from . import cpu_head
from .base import RunTrainer
from .batches import WeightedMeans, even_batches
from .job import Job
from .reference import starts_as_its_base
from .vllm import vllm_settings

#: Completions that are shown at a time, and prompts at most that are answered to measure held-out rewards.
_SHOWN, _MEASURED = 2, 64


class RolloutTrainer(RunTrainer):
    """What trainers of TRL that generate need beside :class:`.base.RunTrainer`.

    Args:
        shown_every: steps between completions that are told as events.
        judges: the rewards, closed when training ends.
        rest: what the trainer of TRL takes.
    """

    may_rest = True
    _metrics: Any
    _logs: Any
    _step: int
    _buffered_inputs: Any
    args: Any
    num_iterations: int
    num_generations_eval: int | None
    ref_model: Any
    temperature: float

    def __init__(self, *, shown_every: int, judges: list[Judge], **rest: Any) -> None:
        self.shown_every, self.judges = shown_every, judges
        super().__init__(reward_funcs=list(judges), **rest)
        model: Any = self.model
        if cpu_head.needed(self.args.device):
            for scored in filter(None, (model, self.ref_model)):
                cpu_head.give_word_scores(scored, self.temperature)
        context = self.numerics.context(self.args.device)
        if "ref" in getattr(model, "peft_config", {}) and starts_as_its_base(model, context):
            model.delete_adapter("ref")  # the base below the adapters is the reference: no copy of them is needed

    # --- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The prompts of each micro-batch's completions."""
        rows: Any = self.train_dataset
        return DataLoader(rows, batch_sampler=self.order, collate_fn=self.data_collator)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.numerics.context(self.args.device):
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        made = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        model: Any = self.model
        step = self.state.global_step
        if model.training and (step % self.shown_every == 0 or step < 3):
            self._show(step + 1)
        return made

    def _show(self, step: int) -> None:
        """Tell of the latest completions, the best and the worst by reward."""
        rewards = list(zip(*self._logs["rewards"].values(), strict=True))
        sums = [sum(r for r in row if not math.isnan(r)) for row in rewards]
        order = sorted(range(len(sums)), key=lambda i: -sums[i])
        prompts, completions = list(self._logs["prompt"]), list(self._logs["completion"])
        for index in dict.fromkeys([*order[: _SHOWN // 2], *order[-(_SHOWN // 2) :]]):
            asked = prompts[index] if isinstance(prompts[index], str) else str(prompts[index][-1]["content"])
            self.emit(Sample(step, asked, plain_text(completions[index]), reward=round(sums[index], 6)))

    # --- figures

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, with the tokens counted."""
        tokens = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
        self.count(tokens.to(torch.int64).reshape(1))
        return super().compute_loss(model, inputs)

    def named(self, gathered: dict[str, list[float]]) -> dict[str, float]:
        """Means over those that are numbers: a reward that scored nothing has none."""
        numbers = {name: [v for v in values if not math.isnan(v)] for name, values in gathered.items()}
        return {name: v for name, v in super().named(numbers).items() if name != "step_time"}

    def measure(self) -> dict[str, float]:
        """Rewards of one completion for each held-out prompt; the same random numbers every time."""
        model: Any = self.model
        rows, device, means = self.held_out, self.args.device, WeightedMeans()
        gathered, training, per_prompt = self._metrics["eval"], model.training, self.num_generations_eval
        self.num_generations_eval = 1
        seen = self.state.num_input_tokens_seen
        model.eval()
        try:
            with torch.no_grad(), _own_random_numbers(self.args.seed + self.args.process_index, device):
                size, world, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
                for chosen, weight in even_batches(min(len(rows), _MEASURED), size, world, rank):
                    gathered.clear()
                    self._generate_and_score_completions([rows[i] for i in chosen])
                    means.add(self.named(gathered), weight)
        finally:
            gathered.clear()
            self.num_generations_eval, self.state.num_input_tokens_seen = per_prompt, seen
            model.train(training)
        wanted = ("reward", "rewards/", "completions/mean_length", "completions/clipped_ratio")
        return {name: value for name, value in means.told(device).items() if name.startswith(wanted)}

    # --- the end, and checkpoints

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the rewards' processes end with it, however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for judge in self.judges:
                judge.process.close()

    def own_state(self) -> dict[str, Any]:
        """Where this rank is among the uses of its latest completions, and these if they have further ones."""
        every = self.args.steps_per_generation * self.num_iterations
        kept = self._buffered_inputs if self._step % every else None
        return {"step": self._step, "completions": kept}

    def load_own_state(self, state: Any) -> None:
        """Go on with the same completions."""
        self._step, self._buffered_inputs = state["step"], moved(state["completions"], self.args.device)


def moved(tree: Any, device: torch.device) -> Any:
    """A tree with its tensors on a device."""
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {name: moved(value, device) for name, value in tree.items()}
    return [moved(value, device) for value in tree] if isinstance(tree, list) else tree


class GroupTrainer(RolloutTrainer, GRPOTrainer):
    """GRPO (arXiv:2402.03300) and its variants, each a way to average the loss."""


class LeaveOneOutTrainer(RolloutTrainer, RLOOTrainer):
    """RLOO (arXiv:2402.14740)."""


@contextlib.contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Sampling in the block starts from ``seed`` and leaves no trace in what is drawn after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generation_settings(job: Job, settled: Rollouts) -> dict[str, Any]:
    """Keywords of GRPOConfig and RLOOConfig for how completions are made and used.

    Raises:
        RecipeError: vLLM is asked for and can't be used, or a batch holds no whole group of completions.
    """
    asked = job.recipe.rollout
    if job.resolved.batch_size % settled.num_generations:
        what = f"a batch of {job.resolved.batch_size} completions holds no whole groups of {settled.num_generations}"
        raise RecipeError(what, where="batch_size", do="Set batch_size to a multiple of rollout.num_generations.")
    return {
        "num_generations": settled.num_generations,
        "max_completion_length": settled.max_completion_length,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p or None,
        "repetition_penalty": asked.repetition_penalty,
        "beta": settled.beta,
        "epsilon": asked.epsilon,
        "epsilon_high": asked.epsilon if asked.epsilon_high == "auto" else asked.epsilon_high,
        "num_iterations": settled.num_iterations,
        "mask_truncated_completions": asked.mask_truncated,
        "reward_weights": [reward.weight for reward in job.recipe.rewards],
        **vllm_settings(job),
        "shuffle_dataset": False,
        "log_completions": False,
    }


def policy_settings(asked: Rollout) -> dict[str, Any]:
    """Keywords of GRPOConfig for what is minimised; see :mod:`finetui.planner.policy_loss`."""
    loss = policy_loss(asked)
    k_good, lambda_good, k_bad, lambda_bad = asked.vespo_weights
    return {
        "loss_type": loss.name,
        "importance_sampling_level": loss.importance,
        "epsilon": asked.epsilon,
        "epsilon_high": loss.epsilon_high,
        "delta": asked.delta,
        "sapo_temperature_pos": asked.sapo_temperatures[0],
        "sapo_temperature_neg": asked.sapo_temperatures[1],
        "vespo_k_pos": k_good,
        "vespo_lambda_pos": lambda_good,
        "vespo_k_neg": k_bad,
        "vespo_lambda_neg": lambda_bad,
        "top_entropy_quantile": asked.top_entropy,
        "entropy_coef": asked.entropy_bonus,
        "off_policy_mask_threshold": asked.off_policy_limit,
        "use_bias_correction_kl": asked.unbiased_kl,
        "scale_rewards": asked.scale_rewards,
        "multi_objective_aggregation": "normalize_then_sum" if asked.separate_rewards else "sum_then_normalize",
        # vLLM's own probabilities of words differ a little; vespo corrects for that word by word, the others by leaving
        # out completions (both TRL's).
        **({"vllm_importance_sampling_mode": "token_truncate"} if loss.name == "vespo" else {}),
    }


def rollout_parts(job: Job) -> dict[str, Any]:
    """What every trainer that generates is made from.

    Raises:
        RecipeError: a reward can't be used.
    """
    set_generation(job.model, job.tokenizer)  # completions end where the chat template ends a turn
    common = job.common()
    columns = [name for name in common["train_dataset"].column_names if name != "prompt"]
    return {
        **common,
        "judges": judges(job.recipe, columns, job.emit),
        "shown_every": job.length.eval_every,
    }


def with_room(rows: Any, room: int, emit: Emit) -> Any:
    """The rows whose prompt is at most ``room`` tokens long, without their tokens: TRL tokenises prompts itself.

    Raises:
        DataError: no prompt is that short.
    """
    if "prompt_ids" not in rows.column_names:
        return rows
    kept = [index for index, ids in enumerate(rows["prompt_ids"]) if len(ids) <= room]
    if not kept:
        what = f"no prompt leaves room for a completion: all are longer than {room} tokens"
        raise DataError(what, where="data", do="Raise sequence_length, or lower rollout.max_completion_length.")
    if len(kept) < len(rows):
        what = f"{len(rows) - len(kept)} of {len(rows)} prompts are longer than {room} tokens and are left out"
        emit(Warn(what, "data", "Raise sequence_length, or lower rollout.max_completion_length."))
        rows = rows.select(kept)
    return rows.remove_columns("prompt_ids")


@contextlib.contextmanager
def initial_policy(job: Job) -> Iterator[None]:
    """TRL loads a full model's reference from where the model came from: after a resume that is not the checkpoint."""
    config = job.model.config
    before, config._name_or_path = config._name_or_path, str(job.folder)
    try:
        yield
    finally:
        config._name_or_path = before


def rollout_trainer(job: Job) -> RolloutTrainer:
    """The trainer of grpo or rloo."""
    settled, asked = rollouts(job.recipe, job.resolved.sequence_length), job.recipe.rollout
    base = {**job.arguments(), **generation_settings(job, settled)}
    parts = rollout_parts(job)
    with initial_policy(job):
        if job.resolved.method == "rloo":
            return LeaveOneOutTrainer(args=RLOOConfig(**base), **parts)
        return GroupTrainer(args=GRPOConfig(**{**base, **policy_settings(asked)}), **parts)
