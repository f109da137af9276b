"""From a plan to a trainer's settings: how long a run is in steps, and everything that TRL would decide by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...planner.plan import Resolved
from ...planner.recipe import Recipe
from ...planner.rollout import sequences_per_row
from ..events import Fallback
from ..models.load import Emit, Numerics
from .optimizers import schedule_settings, stock_settings

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "lion-8bit": "lion_8bit",
    "paged-lion-8bit": "paged_lion_8bit",
}
"""Transformers' names of the optimisers that it has; all others are :mod:`..optimizers`' own."""


@dataclass(frozen=True)
class Length:
    """How long a run is in optimiser steps, once its rows have been counted."""

    steps: int
    warmup: int
    checkpoint_every: int
    eval_every: int


def length(recipe: Recipe, resolved: Resolved, rows: int, emit: Emit) -> Length:
    """The steps that the recipe's epochs come to for the rows there really are, at most its ``max_steps``.

    A plan is made before anything is tokenised, so its number of steps rests on an estimate. What the user asked for
    is a number of epochs; where the two differ the epochs win, and an event says so.
    """
    sequences = rows * sequences_per_row(recipe)
    steps = max(1, math.ceil(resolved.epochs * sequences / resolved.batch_size))
    steps = min(steps, recipe.max_steps or steps)
    if steps != resolved.steps:
        counted = f"{resolved.epochs:g} epochs of {sequences} rows, {resolved.batch_size} per step"
        why = f"{counted}; the plan had only an estimate"
        emit(Fallback(f"{steps} steps instead of {resolved.steps}", why))
    share = steps / max(resolved.steps, 1)
    every = recipe.checkpoint.every if recipe.checkpoint.every != "auto" else round(resolved.checkpoint_every * share)
    measure = recipe.evaluation.every if recipe.evaluation.every != "auto" else round(resolved.eval_every * share)
    return Length(steps, min(steps, round(resolved.warmup_steps * share)), max(1, every), max(1, measure))


def settings(
    resolved: Resolved,
    run_length: Length,
    folder: Path,
    *,
    resumed: bool,
    evaluates: bool,
) -> dict[str, Any]:
    """The ``TrainingArguments`` of a plan, whatever its method: keywords for SFTConfig, DPOConfig and their like."""
    numerics = Numerics.of(resolved)
    cuda = resolved.device == "cuda"
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": resolved.micro_batch,
        "per_device_eval_batch_size": resolved.micro_batch,
        "gradient_accumulation_steps": resolved.accumulation,
        "max_steps": run_length.steps,
        "learning_rate": resolved.learning_rate,
        **schedule_settings(resolved, run_length.steps),
        "warmup_steps": run_length.warmup,
        "optim": OPTIMIZERS.get(resolved.optimizer, "adamw_torch_fused"),
        **stock_settings(resolved),
        "neftune_noise_alpha": resolved.neftune_alpha or None,
        "weight_decay": resolved.weight_decay,
        "max_grad_norm": resolved.max_grad_norm,
        "bf16": numerics.autocast is torch.bfloat16,
        "fp16": numerics.autocast is torch.float16,
        "tf32": None,
        "gradient_checkpointing": False,  # set on the model, see engine/models/layers.py
        "seed": min(resolved.seed, 2**32 - resolved.world_size),  # TRL adds the rank for GRPO; NumPy takes no more
        "data_seed": resolved.seed,
        "use_cpu": not cuda,
        "ddp_backend": ("nccl" if cuda else "gloo") if torch.distributed.is_initialized() else None,
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "eval_on_start": evaluates and not resumed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "warning",
        "dataloader_num_workers": 0,
        "push_to_hub": False,
    }
