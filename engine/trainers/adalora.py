"""What AdaLoRA needs of a trainer (arXiv:2303.10512): ranks taken away as training goes on, and singular vectors kept
orthogonal. PEFT has both, the first as a call after each step, the second inside a loss that is not made here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STATE, PATTERN = "adalora.safetensors", "adalora.json"
_KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def allocates(model: Any) -> bool:
    """Whether the model has an AdaLoRA adapter that is trained."""
    return hasattr(getattr(model, "base_model", None), "rankallocator")


class TakesRanks(TrainerCallback):
    """After each step: importance of every singular value, and the least important ones off, on PEFT's schedule."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        config = self.model.peft_config[self.model.base_model.trainable_adapter_name]
        learns = state.global_step < config.total_step - config.tfinal
        if learns and all(p.grad is None for p in self.model.parameters()):
            return  # a step that was left out says nothing of importance
        self.model.base_model.update_and_allocate(state.global_step)


def add_penalty(model: Any, share: float) -> None:
    """Add to each gradient that of w · mean ‖P Pᵀ − I‖, the distance of singular vectors from orthogonal ones.

    Args:
        share: this micro-batch's part of the step, times the factor by which its loss was scaled up.
    """
    weight = model.peft_config[model.base_model.trainable_adapter_name].orth_reg_weight
    vectors = [(name, p) for name, p in model.named_parameters() if "lora_A." in name or "lora_B." in name]
    vectors = [(name, p) for name, p in vectors if p.requires_grad]
    distances = []
    for name, p in vectors:
        wide = p.float() if "lora_A." in name else p.float().T
        distances.append(torch.linalg.matrix_norm(wide @ wide.T - torch.eye(wide.shape[0], device=p.device)))
    penalty = weight * torch.stack(distances).mean() * share
    for (_, p), gradient in zip(vectors, torch.autograd.grad(penalty, [p for _, p in vectors]), strict=True):
        p.grad = gradient.to(p.dtype) if p.grad is None else p.grad.add_(gradient)


def state_of(model: Any) -> tuple[dict[str, torch.Tensor], bytes]:
    """All parameters at their first rank and what is known of their importance, as :data:`STATE` has them, and the
    ranks that are left, as :data:`PATTERN` has them: PEFT's own file drops both."""
    tensors = {f"parameter.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for kept in _KEPT:
        known = getattr(model.base_model.rankallocator, kept)
        tensors |= {f"{kept}.{name}": value for name, value in known.items()}
    pattern = model.peft_config[model.base_model.trainable_adapter_name].rank_pattern
    return tensors, json.dumps(pattern).encode()


@torch.no_grad()
def load_state(model: Any, folder: Path) -> None:
    """Read back what :func:`state_of` gave."""
    from safetensors.torch import load_file

    named = dict(model.named_parameters())
    for key, value in load_file(folder / STATE).items():
        group, _, name = key.partition(".")
        if group == "parameter":
            named[name].copy_(value)
        else:
            getattr(model.base_model.rankallocator, group)[name] = value.to(model.device)
    pattern = json.loads((folder / PATTERN).read_text(encoding="utf-8"))
    model.peft_config[model.base_model.trainable_adapter_name].rank_pattern = pattern
