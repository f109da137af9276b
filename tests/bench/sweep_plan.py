"""What the planner says of the configurations of ``tests/bench/sweep.py``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import PRESETS, Node, find_gpu
from finetui.planner.memory import peak_memory
from finetui.planner.plan import Memory, Plan, Speed
from finetui.planner.recipe import Recipe
from finetui.planner.settings import Settings
from finetui.planner.solver import make_plan
from finetui.planner.speed import step_speed
from finetui.planner.stacks import find_stack

from .sweep_cases import MODELS, STEPS, TARGETS, TIMED_STEPS, Case

#: What the machine is, as the catalog calls it.
GPU = "H200"


@cache
def config_of(model: str) -> dict[str, Any]:
    """The shape of a checkpoint: its text tower, where the preset has more."""
    config = json.loads((PRESETS / "models" / MODELS[model] / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config) if "vocab_size" not in config else config
    return {**config, **text}


@cache
def architecture_of(model: str) -> Architecture:
    return Architecture.from_config(config_of(model), model)


def recipe_of(case: Case, model: str, rows: Path) -> dict[str, Any]:
    """The recipe of one of our runs; what a card's plan decides is left open."""
    tree: dict[str, Any] = {
        "model": model, "method": "pretrain", "tuning": {"type": case.tuning},
        "data": [{"path": str(rows), "format": "text"}], "sequence_length": case.length, "packing": False,
        "max_steps": TIMED_STEPS if case.timed else STEPS, "epochs": 10, "evaluation": {"holdout": 0.0}, "track": [],
        "checkpoint": {"every": 10**6}, "optimizer": {"learning_rate": 1e-5, "schedule": "constant"},
        "hardware": {},
    }  # fmt: skip
    if case.tuning != "full":
        tree["tuning"] |= {"rank": case.rank, "targets": TARGETS}
    if case.card:
        tree["batch_size"] = 16
    else:
        batch = case.micro_batch * case.accumulation
        tree |= {"batch_size": batch, "micro_batch": case.micro_batch}
        tree["optimizer"]["name"] = case.optimizer
        tree["hardware"] |= {"checkpointing": case.checkpointing, "precision": case.precision}
        if case.checkpointing == "selective":
            tree["hardware"]["kept_layers"] = case.kept_layers
    return tree


def plan_of(case: Case, model: str = "model", rows: Path = Path("rows.jsonl")) -> tuple[Recipe, Plan]:
    """Recipe and plan of one of our runs, whose rows are as long as they may be."""
    recipe = Recipe.build(recipe_of(case, model, rows))
    node = Node(find_gpu(case.card or GPU), local=True)
    return recipe, make_plan(recipe, architecture_of(case.model), node)


def predicted(case: Case) -> dict[str, Any]:
    """Memory in GiB and speed in tokens/s that a configuration is predicted to have."""
    if case.stack == "finetui":
        plan = plan_of(case)[1]
        return figures(plan.memory, plan.speed)
    settings = Settings(
        case.tuning, case.length, micro_batch=case.micro_batch, checkpointing=case.checkpointing,  # type: ignore[arg-type]
        rank=case.rank, targets=tuple(TARGETS), quantization="nf4" if case.tuning == "qlora" else "none",
        optimizer=case.optimizer, precision="bf16",
    )  # fmt: skip
    asked = (architecture_of(case.model), settings, find_stack(case.stack), find_gpu(GPU))
    return figures(peak_memory(*asked), step_speed(*asked))


def figures(memory: Memory, speed: Speed) -> dict[str, Any]:
    """What is written down of a prediction."""
    return {
        "allocated_gib": memory.allocated_gib, "reserved_gib": memory.reserved_gib, "device_gib": memory.device_gib,
        "high_gib": memory.high_gib, "margins": memory.margins, "moment": memory.moment,
        "tokens_per_s": speed.tokens_per_s, "low_tokens_per_s": speed.low_tokens_per_s,
        "high_tokens_per_s": speed.high_tokens_per_s,
        "terms": {name: round(size, 4) for name, size in memory.terms.items()},
    }  # fmt: skip
