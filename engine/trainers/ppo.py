"""PPO on TRL's rollout machinery: GRPO's trainer generates and judges, this one learns values and clips updates.

TRL has no PPO trainer any more. The reward of a completion falls on its last token, minus at every token
``beta (log pi - log pi_ref)``; a value head, one row of fp32 weights on the policy's last hidden states, estimates what
is still to come; advantages are generalised and whitened (``gae.py``). Each batch of completions serves
``num_iterations`` updates of the clipped objective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad, use_adapter

from ...planner.errors import RecipeError
from ...planner.rollout import rollouts
from ..evaluate import reduce_sum
from .gae import KlControl, advantages, clipped_policy_loss, clipped_value_loss, masked_mean, whitened
from .job import Job
from .rl import RolloutTrainer, generation_settings, initial_policy, rollout_parts
from .walks import shorten_walks

_HEAD = "value_head"


class ValueHead(nn.Module):
    """``V(h) = w h + b`` over hidden states, in fp32; 0 at first, so that early advantages are plain returns."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, device=device))
        self.bias = nn.Parameter(torch.zeros((), device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., width]`` to ``[...]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight + self.bias


class ProximalTrainer(RolloutTrainer, GRPOTrainer):
    """PPO (arXiv:1707.06347).

    Args:
        job: whose recipe has the settings of section ``rollout``.
        rest: what :class:`.rl.RolloutTrainer` takes.
    """

    def __init__(self, *, job: Job, per_prompt: int, **rest: Any) -> None:
        asked, settled = job.recipe.rollout, rollouts(job.recipe, job.resolved.sequence_length)
        self.asked = asked
        self.control_kl = KlControl(settled.beta, asked.kl_target)
        self._values: list[Tensor] = []
        self._wants_values = False
        model = rest["model"]
        width = model.config.get_text_config().hidden_size
        model.add_module(_HEAD, ValueHead(width, job.device))
        backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
        # Within the model's forward, so that data parallelism sees the head used.
        backbone.register_forward_hook(self._estimate)
        super().__init__(**rest)
        self.num_generations = per_prompt  # which GRPO's settings would not allow to be 1

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The recipe's optimiser, in which the value head has a rate of its own."""
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        head = self.value_head.requires_grad_(False)
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.asked.value_learning_rate
        optimizer.add_param_group({"params": list(head.requires_grad_(True).parameters()), "lr": rate})
        self._trained = []
        shorten_walks(self.model, [parameter for _, parameter in self.trained_parameters()])
        return optimizer

    @property
    def value_head(self) -> ValueHead:
        """The head, part of the model while it trains."""
        head: ValueHead = getattr(self.model, _HEAD)
        return head

    def _estimate(self, _module: Any, _inputs: Any, output: Any) -> None:
        if self._wants_values:
            self._values.append(self.value_head(output.last_hidden_state))

    def _policy(self, model: Any, batch: dict[str, Any], size: int, *, values: bool = True) -> tuple[Tensor, ...]:
        """Log-probabilities, entropies and values at completion tokens: ``[completions, length]`` each.

        The value of a token is that of the state in which it was chosen: the hidden state before it.
        """
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length = batch["completion_ids"].shape[1]
        self._wants_values = values
        try:
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                model, ids, mask, length, batch_size=size, compute_entropy=values
            )
            found = torch.cat(self._values)[:, -length - 1 : -1] if values else logps
        finally:
            self._wants_values = False
            self._values.clear()
        return logps, entropies, found

    # --- completions

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        model: Any = self.model
        mode = "train" if model.training else "eval"
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, completion_ids, _, completions, *_ = self._generate(prompts)
        batch = self._padded(prompt_ids, completion_ids)
        told = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        world_scores = (told * self.reward_weights.to(told.device)).nansum(dim=1)
        self._note(mode, told, world_scores, prompts, completions)
        if mode == "eval":
            return batch
        start = self.args.process_index * len(inputs)
        mine = slice(start, start + len(inputs))
        # A completion that no reward scored has no part in the update.
        unscored = torch.isnan(told[mine]).all(dim=1)
        learned = batch["completion_mask"] * (~unscored).unsqueeze(1)
        if self.mask_truncated_completions:
            ended = torch.isin(_last(batch), torch.tensor(self.eos_token_ids, device=told.device))
            learned = learned * ended.unsqueeze(1)
        size = self.args.per_device_train_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(model, self.args.gradient_checkpointing_kwargs):
            logps, _, values = self._policy(model, batch, size)
            reference = self._reference(batch, size) if self.control_kl.beta else logps
        kl = (logps - reference) * batch["completion_mask"]
        rewards = -self.control_kl.beta * kl
        ends = batch["completion_mask"].sum(dim=1).long().clamp(min=1) - 1
        rewards[torch.arange(len(inputs), device=rewards.device), ends] += world_scores[mine]
        estimated, returns = advantages(
            rewards, values, learned, discount=self.asked.discount, gae_lambda=self.asked.gae_lambda
        )
        local = torch.stack([(estimated * learned).sum(), (estimated**2 * learned).sum(), learned.sum().float()])
        total, squares, count = reduce_sum(local, self.args.device).unbind()
        per_completion = self.accelerator.gather(kl.sum(dim=1)).mean().item()
        self._metrics[mode]["kl"].append(per_completion)
        self._metrics[mode]["kl_beta"].append(self.control_kl.beta)
        self.control_kl.update(per_completion, len(world_scores))
        made = {
            **batch,
            "learned": learned,
            "advantages": whitened(estimated, learned, (total, squares, count)),
            "returns": returns,
            "old_logps": logps,
            "old_values": values,
            "num_items_in_batch": count,
        }
        step = self.state.global_step
        if step % self.shown_every == 0 or step < 3:
            self._show(step + 1)
        return made

    def _padded(self, prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Tensor]:
        word, device = self._tokenizer.pad_token_id, self.args.device
        sides = {"prompt": (prompts, "left"), "completion": (completions, "right")}
        batch = {}
        for name, (rows, side) in sides.items():
            ids = [torch.tensor(row, dtype=torch.long) for row in rows]
            batch[f"{name}_ids"] = pad(ids, padding_value=word, padding_side=side).to(device)
            batch[f"{name}_mask"] = pad([torch.ones_like(row) for row in ids], padding_side=side).to(device)
        return batch

    def _reference(self, batch: dict[str, Tensor], size: int) -> Tensor:
        """Log-probabilities of the model that training began with."""
        if self.ref_model is not None:
            return self._policy(self.ref_model, batch, size, values=False)[0]
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self._policy(self.model, batch, size, values=False)[0]

    def _note(self, mode: str, told: Tensor, scores: Tensor, prompts: list[Any], completions: list[Any]) -> None:
        figures = self._metrics[mode]
        for index, name in enumerate(self.reward_func_names):
            figures[f"rewards/{name}/mean"].append(torch.nanmean(told[:, index]).item())
        figures["reward"].append(scores.mean().item())
        figures["reward_std"].append(scores.std(correction=0).item())
        for name, values in self._pending_metrics.items():
            figures[name].append(sum(values) / len(values))
        self._pending_metrics.clear()
        start = self.args.process_index * len(prompts)
        self._logs["prompt"].extend(prompts)
        self._logs["completion"].extend(completions)
        for index, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(told[start : start + len(prompts), index].tolist())

    # --- the update

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        logps, entropies, values = self._policy(model, inputs, len(inputs["completion_ids"]))
        mask = inputs["learned"]
        policy, bound = clipped_policy_loss(logps, inputs["old_logps"], inputs["advantages"], mask, self.asked.epsilon)
        value = clipped_value_loss(values, inputs["old_values"], inputs["returns"], mask, self.asked.value_clip)
        # The mean over the tokens of the whole batch, of which this is a part; DDP divides by the number of ranks.
        share = self.accelerator.num_processes / inputs["num_items_in_batch"].clamp(min=1)
        loss = (policy + self.asked.value_weight * value).sum() * share
        figures = {
            "policy_loss": masked_mean(policy, mask),
            "value_loss": masked_mean(value, mask),
            "values": masked_mean(values, mask),
            "entropy": masked_mean(entropies, mask),
            "clip_ratio": masked_mean(bound.float(), mask),
            "approximate_kl": masked_mean(inputs["old_logps"] - logps, mask),
        }
        told = self.accelerator.gather(torch.stack([v.detach().float() for v in figures.values()])[None]).mean(0)
        for name, figure in zip(figures, told.tolist(), strict=True):
            self._metrics["train"][name].append(figure)
        return loss

    # --- checkpoints: the head is saved beside the model, not in it

    @contextlib.contextmanager
    def model_to_save(self) -> Iterator[Any]:
        """The policy alone."""
        model: Any = self.model
        head = self.value_head
        delattr(model, _HEAD)
        try:
            yield model
        finally:
            model.add_module(_HEAD, head)

    def own_state(self) -> dict[str, Any]:
        """Also the value head and the coefficient of KL, which are the same on every rank."""
        return {**super().own_state(), "head": dict(self.value_head.state_dict()), "beta": self.control_kl.beta}

    def load_own_state(self, state: Any) -> None:
        """The value head goes on with what it has learned."""
        super().load_own_state(state)
        self.value_head.load_state_dict(state["head"])
        self.control_kl.beta = state["beta"]

    def finish(self) -> None:
        """Take the head off: what is left is a plain model."""
        delattr(self.model, _HEAD)


def _last(batch: dict[str, Tensor]) -> Tensor:
    ends = batch["completion_mask"].sum(dim=1).long().clamp(min=1) - 1
    return batch["completion_ids"].gather(1, ends.unsqueeze(1)).squeeze(1)


def ppo_trainer(job: Job) -> ProximalTrainer:
    """The trainer of ppo."""
    settled = rollouts(job.recipe, job.resolved.sequence_length)
    wanted = generation_settings(job, settled)
    # GRPO's settings ask for groups of two or more; what it does with groups is overridden.
    batch = job.resolved.batch_size
    groups = next((size for size in range(2, batch + 1) if batch % size == 0), None)
    parts = rollout_parts(job)
    if groups is None:
        raise RecipeError("ppo needs more than one completion per step", where="batch_size", do="Use 2 or more.")
    args = GRPOConfig(**{**job.arguments(), **wanted, "num_generations": groups})
    with initial_policy(job):
        return ProximalTrainer(job=job, per_prompt=settled.num_generations, args=args, **parts)
