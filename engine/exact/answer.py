"""A plan whose memory was followed instead of calculated: the formula chooses, one step on fake tensors answers."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...planner.architecture import Architecture
from ...planner.errors import HardwareError, MissingExtraError, ModelError, RecipeError
from ...planner.frame import Frame
from ...planner.hardware import GIB, Gpu, Node, node_for
from ...planner.hub import find_config
from ...planner.memory import cublas_workspaces
from ...planner.plan import Memory, Plan, Reason
from ...planner.recipe import Recipe
from ...planner.solver import make_plan
from ..planning import finished_runs, workload_of

if TYPE_CHECKING:
    from .step import Followed


def exact_plan(recipe: Recipe, *, framework: str = "finetui", node: Node | None = None) -> Plan:
    """Resolve a recipe as :func:`..planning.plan_for` does, then follow one step of that plan for its memory.

    The plan's ``basis`` is ``exact``: allocated memory, its terms and the parameter counts are those of the installed
    transformers, PEFT and TRL. What the allocator and the driver add, and speed, stay the formula's.

    Raises:
        MissingExtraError: torch or transformers are not installed.
        HardwareError: the plan is for the CPU.
        ModelError: transformers does not know the model.
        RecipeError: a part of the recipe is not followed.
    """
    # Nothing may be asked of the Hub, and no library is to talk on the way.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            from .step import follow
        except ModuleNotFoundError as error:
            raise MissingExtraError("plan --exact", "train") from error
    if recipe.stages:
        do = "Plan the recipe of one stage."
        raise RecipeError("a workflow of several stages is not followed", where="--exact", do=do)
    name, config, _origin = find_config(recipe.model)
    node = node or node_for(recipe.hardware)
    if node.gpu.kind == "cpu":
        do = "Name a GPU, as in --gpu RTX4090, or plan without --exact."
        raise HardwareError("only the memory of a GPU is followed", where="--exact", do=do)
    architecture = _architecture(config, name)
    workload = workload_of(recipe)
    plan = make_plan(recipe, architecture, node, workload, framework=framework, finished=finished_runs())
    frame = Frame(recipe, architecture, node, workload)
    micro = plan.resolved.micro_batch
    masked = frame.packing or (micro > 1 and frame.padding_share(micro) < 1.0)
    resolved = replace(plan.resolved, sequence_length=frame.row_tokens())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        followed = follow(config, resolved, name, framework=framework, masked=masked)
    return _with(plan, followed, node.gpu, exact=architecture.exact)


def _architecture(config: Mapping[str, Any], name: str) -> Architecture:
    """The planner's own reading; of a family that it does not know, through the names and defaults of transformers."""
    try:
        read = Architecture.from_config(config, name)
    except ModelError:
        if not config.get("model_type"):
            raise
        read = None
    if read is not None and read.exact:
        return read
    from .shapes import text_config

    text = text_config(config, name)
    shapes = {key: getattr(text, key, None) for key in _SHAPES}
    known = {key: value for key, value in shapes.items() if value is not None}
    return Architecture.from_config({**text.to_dict(), **known}, name)


_SHAPES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def _with(plan: Plan, followed: Followed, gpu: Gpu, *, exact: bool) -> Plan:
    memory = _memory(plan.memory, followed, gpu, plan.hardware.count)
    fits = memory.device_gib <= plan.hardware.memory_gib
    warnings = [line for line in plan.warnings if exact or "Figures are less certain" not in line]
    warnings += [f"Not followed: {note}." for note in followed.notes]
    if fits != plan.fits:
        formula = f"the formula said {plan.memory.device_gib:.1f} GiB"
        warnings.append(f"This plan {'fits' if fits else 'does not fit'} as followed; {formula}.")
    why = f"one step followed on fake tensors through {followed.versions}; speed and time are the formula's"
    return replace(
        plan,
        model=replace(
            plan.model,
            parameters=followed.parameters,
            trainable=followed.trainable,
            modules=plan.model.modules if exact else {},
        ),
        memory=memory,
        fits=fits,
        basis="exact",
        correction={},
        reasons=[*(r for r in plan.reasons if r.setting != "basis"), Reason("basis", "exact", why)],
        warnings=warnings,
    )


def _memory(formula: Memory, followed: Followed, gpu: Gpu, devices: int) -> Memory:
    """What was followed, with what the formula says of the allocator, the driver and several devices."""
    moment = followed.moment
    live = dict(followed.peaks[moment].terms)
    workspaces = cublas_workspaces(gpu)
    bucket = sum(live.get(name, 0) for name in ("gradients",)) if devices > 1 else 0
    allocated = (sum(live.values()) + workspaces + bucket) / GIB
    slack = formula.reserved_gib - formula.allocated_gib
    context = formula.device_gib - formula.reserved_gib
    device = allocated + slack + context
    names = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "buffers")
    terms = {name: live.get(name, 0) / GIB for name in names}
    terms["buffers"] += (workspaces + bucket) / GIB + slack
    margin = formula.margins.get("device", 0.0)
    return replace(
        formula,
        allocated_gib=allocated,
        reserved_gib=allocated + slack,
        device_gib=device,
        low_gib=max(device - margin, 0.0),
        high_gib=device + margin,
        terms={**terms, "context": context},
        moment=moment,
        moments={name: (peak.bytes + workspaces) / GIB for name, peak in followed.peaks.items()},
    )
