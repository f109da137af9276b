"""What AdaLoRA needs of a trainer (arXiv:2303.10512): ranks taken away as training goes on, and singular vectors kept
orthogonal. PEFT has both, the first as a call after each step, the second inside a loss that is not made here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_STATE, _PATTERN = "adalora.safetensors", "adalora.json"
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


def save_state(model: Any, folder: Path) -> None:
    """All parameters at their first rank and what is known of their importance: PEFT's own file drops both."""
    from safetensors.torch import save_file

    tensors = {f"parameter.{n}": p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    for kept in _KEPT:
        known = getattr(model.base_model.rankallocator, kept)
        tensors |= {f"{kept}.{name}": value.contiguous() for name, value in known.items()}
    save_file(tensors, folder / _STATE)
    pattern = model.peft_config[model.base_model.trainable_adapter_name].rank_pattern
    (folder / _PATTERN).write_text(json.dumps(pattern), encoding="utf-8")


@torch.no_grad()
def load_state(model: Any, folder: Path) -> None:
    """Read back what :func:`save_state` wrote."""
    from safetensors.torch import load_file

    named = dict(model.named_parameters())
    for key, value in load_file(folder / _STATE).items():
        group, _, name = key.partition(".")
        if group == "parameter":
            named[name].copy_(value)
        else:
            getattr(model.base_model.rankallocator, group)[name] = value.to(model.device)
    pattern = json.loads((folder / _PATTERN).read_text(encoding="utf-8"))
    model.peft_config[model.base_model.trainable_adapter_name].rank_pattern = pattern
