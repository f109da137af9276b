"""Binary classifier optimisation (BCO, arXiv:2404.04656): answers judged good or bad, told apart by their reward.

With the reward r = β·(log π(y|x) − log π_ref(y|x)) of an answer::

    −w₊·log σ(r − δ)       of a good answer
    −w₋·log σ(δ − r)       of a bad one           δ = (E₊[r] + E₋[r]) / 2

The expectations are running means over all answers of their kind that the run has trained on, the batch at hand
included; until there are both kinds, that of the other kind stands in. Unlike KTO it needs no mismatched answers, and
so two forward passes less. TRL, from which the rest comes, no longer has a trainer for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl.trainer.kto_trainer import use_adapter

from ..evaluate import reduce_sum
from .preference import JudgedTrainer


class BinaryTrainer(JudgedTrainer):
    """BCO on KTO's rows and reference."""

    def __init__(self, **rest: Any) -> None:
        self.seen = torch.zeros(2, 2, dtype=torch.float64)
        """Sums of rewards and numbers of answers, of bad ones and of good ones."""
        super().__init__(**rest)

    def loss_of(self, model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """The mean over the answers of this micro-batch, and the figures of both kinds."""
        out = self._scored(model, inputs, routed=self.aux_loss_enabled)
        with torch.no_grad():
            reference = self._reference(inputs)
        logps = out.log_probs.sum(-1).float()
        rewards = self.objective.beta * (logps - reference)
        good = torch.as_tensor(inputs["label"], dtype=torch.bool, device=rewards.device)
        batch = self._gathered(rewards.detach(), logps.detach(), good)
        if model.training:
            self.seen += batch[:, :2]
        delta = self.delta
        weights = torch.where(good, self.objective.desirable_weight, self.objective.undesirable_weight)
        loss = -(weights * logsigmoid(torch.where(good, rewards - delta, delta - rewards))).mean()
        self._tell(batch, delta, "train" if model.training else "eval")
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * out.aux_loss
        return loss

    @property
    def delta(self) -> float:
        """Where good answers end and bad ones begin."""
        means = [float(total / count) for total, count in self.seen if count]
        return sum(means) / len(means) if means else 0.0

    def _scored(self, model: Any, inputs: dict[str, Any], *, routed: bool = False) -> Any:
        ids = inputs["input_ids"]
        return model(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            labels=ids.masked_fill(inputs["completion_mask"] == 0, -100),
            use_cache=False,
            fused_lm_head=True,
            **({"output_router_logits": True} if routed else {}),
        )

    def _reference(self, inputs: dict[str, Any]) -> torch.Tensor:
        if self.ref_model is not None:
            scored = self._scored(self.ref_model, inputs)
        else:
            policy: Any = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                scored = self._scored(self.model, inputs)
        total: torch.Tensor = scored.log_probs.sum(-1).float()
        return total

    def _gathered(self, rewards: torch.Tensor, logps: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
        """``[2, 3]`` over all ranks: of bad and of good answers the sum of rewards, their number, the sum of logps."""
        kinds = torch.stack([~good, good]).double()
        sums = torch.stack([kinds @ rewards.double(), kinds.sum(1), kinds @ logps.double()], dim=1)
        return reduce_sum(sums, rewards.device).cpu()

    def _tell(self, batch: torch.Tensor, delta: float, mode: str) -> None:
        told: Any = self._metrics[mode]
        told["delta"].append(delta)
        means = {}
        for name, (total, count, logps) in zip(("rejected", "chosen"), batch.tolist(), strict=True):
            if count:
                means[name] = total / count
                told[f"rewards/{name}"].append(means[name])
                told[f"logps/{name}"].append(logps / count)
        if len(means) == 2:
            told["rewards/margins"].append(means["chosen"] - means["rejected"])

    def own_state(self) -> Any:
        """The running means, which every rank has."""
        return {"seen": self.seen}

    def load_own_state(self, state: Any) -> None:
        """Go on with the same means."""
        if state is not None:
            self.seen = state["seen"]
