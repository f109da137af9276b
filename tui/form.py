"""The plan's form as data: which keys of a recipe are fields, what values each steps through, and what they mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from ..planner.errors import UserError
from ..planner.inside import local_path
from ..planner.options import SHORT, TUNING_KEYS
from ..planner.plan import Plan
from . import format  # noqa: A004

if TYPE_CHECKING:
    from ..planner.recipe import Recipe

Tree = dict[str, Any]
#: Choices of the hardware field that are no GPU of the catalog.
THIS_MACHINE, CPU = "this machine", "CPU"


@dataclass(frozen=True)
class FieldSpec:
    """One field.

    ``key`` is its path in a recipe. ``steps`` are the values that left and right go through; ``closed`` if no other is
    allowed. ``resolved`` shows what the planner made of ``auto``. ``hides``: it is shown only where it has a meaning.
    """

    key: str
    label: str
    help: str
    steps: Sequence[str] = ()
    closed: bool = False
    auto: bool = True
    resolved: Callable[[Plan], str] | None = None
    hides: bool = False


# The recipe's own lists would be exact, but importing them takes longer than the first picture may.
_TUNINGS = (
    "full", "lora", "qlora", "lora-fp8", "dora", "qdora", "rslora", "lora+", "pissa", "olora", "eva", "loftq",
    "adalora", "ia3", "vera", "oft", "qoft", "loha", "lokr", "prompt", "prefix",
)  # fmt: skip
_OPTIMIZERS = (
    "auto", "adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "lion", "lion-8bit", "paged-lion-8bit", "muon",
    "adafactor", "came", "adopt", "galore", "apollo", "apollo-mini", "schedule-free", "sgd",
)  # fmt: skip
_LOSSES = ("nll", "dft", "eaft")
#: Methods that learn from single tokens: what a loss can weigh, and what steps can be replayed of.
_TOKEN_METHODS = ("sft", "pretrain")
_METHODS = (*_TOKEN_METHODS, "distill", "dpo", "ipo", "orpo", "kto", "cpo", "simpo", "reward", "grpo", "rloo", "ppo")

FIELDS: tuple[FieldSpec, ...] = (
    FieldSpec("model", "model", "A hub id, a folder or a config.json", auto=False),
    FieldSpec("method", "method", "What is learned from the data", _METHODS, True, False),
    FieldSpec("distillation.teacher", "  teacher", "The model that a student learns from", auto=False, hides=True),
    FieldSpec(
        "tuning.type",
        "tuning",
        "qlora: adapters on a 4-bit base",
        _TUNINGS,
        True,
        False,
    ),
    FieldSpec("tuning.rank", "  rank", "Rank of the adapters", ("4", "8", "16", "32", "64", "128", "256"), auto=False),
    FieldSpec(
        "tuning.alpha",
        "  alpha",
        "Scale of the adapters; auto is 2 × rank",
        ("auto", "8", "16", "32", "64", "128"),
        resolved=lambda plan: f"{plan.resolved.alpha:g}",
    ),
    FieldSpec("data", "data", "A file, a folder or a hub dataset", auto=False),
    FieldSpec(
        "sequence_length",
        "sequence",
        "In tokens; longer rows are cut",
        ("auto", "512", "1024", "2048", "4096", "8192", "16384", "32768"),
        resolved=lambda plan: f"{plan.resolved.sequence_length:,} tokens",
    ),
    FieldSpec(
        "batch_size",
        "batch",
        "Sequences per step over all GPUs",
        ("auto", "1", "2", "4", "8", "16", "32", "64", "128", "256"),
        resolved=lambda plan: (
            f"{plan.resolved.batch_size} = {plan.resolved.micro_batch} × {plan.resolved.accumulation}"
            + (f" × {plan.resolved.world_size} GPUs" if plan.resolved.world_size > 1 else "")
        ),
    ),
    FieldSpec("epochs", "epochs", "Passes over the data", ("0.25", "0.5", "1", "2", "3", "4", "5", "10"), auto=False),
    FieldSpec("loss", "loss", "nll; dft and eaft weigh each token", _LOSSES, True, False),
    FieldSpec(
        "optimizer.learning_rate",
        "learning rate",
        "auto: 2e-4 for adapters, 1e-5 for full",
        ("auto", "1e-6", "2e-6", "5e-6", "1e-5", "2e-5", "5e-5", "1e-4", "2e-4", "5e-4", "1e-3"),
        resolved=lambda plan: f"{plan.resolved.learning_rate:.3g}",
    ),
    FieldSpec(
        "optimizer.name",
        "optimizer",
        "auto: AdamW, in 8 bits if memory is short",
        _OPTIMIZERS,
        True,
        resolved=lambda plan: plan.resolved.optimizer,
    ),
    FieldSpec(
        "hardware.checkpointing",
        "checkpointing",
        "What layers compute again to save memory",
        ("auto", "none", "selective", "offload", "full"),
        True,
        resolved=lambda plan: plan.resolved.checkpointing,
    ),
    FieldSpec("hardware.gpu", "hardware", "This machine, its CPU, or any GPU", (THIS_MACHINE, CPU), True, False),
    FieldSpec(
        "hardware.gpus",
        "  how many",
        "How many GPUs",
        ("auto", "1", "2", "4", "8"),
        resolved=lambda plan: str(plan.hardware.count),
    ),
    FieldSpec(
        "hardware.strategy",
        "  strategy",
        "ddp: each GPU has all of it; fsdp: its share",
        ("auto", "single", "ddp", "fsdp"),
        True,
        resolved=lambda plan: plan.resolved.strategy,
    ),
    FieldSpec(
        "hardware.graphs",
        "  graphs",
        "Steps as CUDA graphs, for small models",
        ("auto", "true", "false"),
        True,
        resolved=lambda plan: "true" if plan.resolved.graphs else "false",
    ),
)

#: What Launch asks beside the plan: when a run is ended, and what is kept of it.
LAUNCH_FIELDS: tuple[FieldSpec, ...] = (
    FieldSpec("limits.cost_usd", "stop at $", "Stop, saved, before this much is spent", ("none",), auto=False),
    FieldSpec("limits.hours", "stop after h", "Stop, saved, after so many hours", ("none",), auto=False),
    FieldSpec("hardware.usd_per_h", "$ per hour", "What this machine costs; none is free", ("none",), auto=False),
    FieldSpec(
        "limits.nan_steps", "bad steps", "Fail after so many in a row: NaN, infinity or an explosion",
        ("1", "2", "3", "5", "10"), auto=False,
    ),
    FieldSpec(
        "limits.restarts", "restarts", "Go on by itself after a hang or a crash, so many times",
        ("0", "1", "2", "3", "5", "10"), auto=False,
    ),
    FieldSpec(
        "limits.at_end", "at the end", "nothing, shutdown, or a command of yours for the shell",
        ("nothing", "shutdown"), auto=False,
    ),
    FieldSpec(
        "checkpoint.every", "checkpoints", "Steps between checkpoints",
        ("auto", "10", "20", "50", "100", "200", "500", "1000"),
        resolved=lambda plan: f"every {plan.resolved.checkpoint_every:,} steps",
    ),
    FieldSpec("checkpoint.keep", "  kept", "How many of the latest stay", ("1", "2", "3", "5", "10"), auto=False),
)  # fmt: skip


def get(tree: Tree, key: str) -> str:
    """A field's value as the user would write it; ``auto`` or the default where the recipe says nothing."""
    if key == "data":
        sources = tree.get("data") or []
        sources = [sources] if isinstance(sources, str | dict) else sources
        trained = [source for source in sources if not _held_out(source)]
        paths = [source if isinstance(source, str) else str(source.get("path", "")) for source in trained]
        return paths[0] if len(paths) == 1 else f"{len(paths)} sources" if paths else ""
    if key == "hardware.gpu":
        hardware = tree.get("hardware") or {}
        return hardware.get("gpu") or (CPU if hardware.get("device") == "cpu" else THIS_MACHINE)
    if key == "limits.at_end":
        wish = (tree.get("limits") or {}).get("at_end") or "nothing"
        return str(wish if isinstance(wish, str) else wish.get("command") or wish.get("do", "nothing"))
    node: Any = {"type": tree["tuning"]} if key.startswith("tuning") and isinstance(tree.get("tuning"), str) else None
    parts = key.split(".")
    for part in parts if node is None else parts[1:]:
        node = (tree if node is None else node).get(part) if isinstance(tree if node is None else node, dict) else None
        if node is None:
            return _DEFAULTS.get(key, "auto")
    if isinstance(node, bool):
        return str(node).lower()
    return f"{node:g}" if isinstance(node, float) else str(node)


def _held_out(source: Any) -> bool:
    return isinstance(source, dict) and source.get("split") == "eval"


_DEFAULTS = {
    "model": "", "method": "sft", "loss": "nll", "tuning.type": "lora", "tuning.rank": "16", "epochs": "1",
    "limits.cost_usd": "none", "limits.hours": "none", "limits.nan_steps": "3", "limits.restarts": "3",
    "limits.at_end": "nothing", "checkpoint.keep": "2", "hardware.usd_per_h": "none", "distillation.teacher": "",
}  # fmt: skip


def put(tree: Tree, key: str, text: str) -> Tree:
    """A copy of ``tree`` with one field set to what was typed; what makes no sense beside it is left out."""
    tree = copy.deepcopy(tree)
    text = text.strip()
    if key == "model":
        tree["model"] = _local(text)
    elif key == "data":
        _put_data(tree, _local(text))
    elif key == "hardware.gpu":
        hardware = _section(tree, "hardware")
        for name in ("gpu", "device"):
            hardware.pop(name, None)
        if text == CPU:
            hardware["device"] = "cpu"
        elif text not in ("", THIS_MACHINE):
            hardware["gpu"] = text
        if isinstance(hardware.get("gpus"), list) or text == CPU:  # indices of another machine's GPUs
            hardware.pop("gpus", None)
    else:
        _put_value(tree, key, text)
    return {name: value for name, value in tree.items() if value not in ({}, [])}


def _local(text: str) -> str:
    """A path that is there as an absolute one, because a run keeps its recipe in another folder; hub ids stay."""
    try:
        path = local_path(text)
    except UserError:  # which the plan tells
        return text
    there = bool(text) and (text.startswith(("./", "../", "~")) or path.exists())
    return str(path.resolve()) if there else text


def _put_data(tree: Tree, text: str) -> None:
    have = tree.get("data")
    others = [source for source in have if _held_out(source)] if isinstance(have, list) else []
    tree["data"] = [{"path": text}, *others] if text else []


def _put_value(tree: Tree, key: str, text: str) -> None:
    section, _, name = key.rpartition(".")
    target = _section(tree, section) if section else tree
    if key == "limits.at_end" and text not in ("", "nothing", "shutdown"):  # a line for the shell, whatever it says
        target[name] = {"do": "command", "command": text}
        return
    if text in ("", _DEFAULTS.get(key, "auto")):
        target.pop(name, None)
    else:
        target[name] = _parsed(text)
    if key == "tuning.type":
        kept = TUNING_KEYS.get(SHORT.get(text, {"type": text})["type"], set()) - set(SHORT.get(text, ()))
        for adapter_key in set(target) - kept - {"type"}:
            target.pop(adapter_key)
    if key == "method" and text not in _TOKEN_METHODS:
        tree.pop("loss", None)
    if key == "method" and text != "distill":
        tree.pop("distillation", None)
    if key == "batch_size" and name in tree:
        tree.pop("batch_tokens", None)


def _section(tree: Tree, name: str) -> Tree:
    section = tree.get(name)
    if isinstance(section, str):
        section = {"type": section}
    tree[name] = section if isinstance(section, dict) else {}
    return tree[name]


def _parsed(text: str) -> Any:
    """What was typed as YAML would read it, but with ``2e-4`` a number, which YAML 1.1 takes for text."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def step(spec: FieldSpec, value: str, direction: int, steps: Sequence[str] | None = None) -> str:
    """The value before or after ``value``; one that is none of the steps goes to its nearest neighbour."""
    values = list(steps if steps is not None else spec.steps)
    if not values:
        return value
    if value in values:
        return values[min(max(values.index(value) + direction, 0), len(values) - 1)]
    try:
        number = float(value)
    except ValueError:
        return values[0]
    near = [v for v in values if v != "auto" and (float(v) - number) * direction > 0]
    return (near[0] if direction > 0 else near[-1]) if near else value


def disabled(tree: Tree, key: str) -> bool:
    """Whether a field has no meaning beside the others."""
    section, _, name = key.rpartition(".")
    if section == "tuning" and name != "type":
        kind = get(tree, "tuning.type")
        return name not in TUNING_KEYS.get(SHORT.get(kind, {"type": kind})["type"], {name})
    if key == "distillation.teacher":
        return get(tree, "method") != "distill"
    if key in ("loss", "hardware.graphs") and get(tree, "method") not in _TOKEN_METHODS:
        return True
    return key in ("hardware.gpus", "hardware.strategy", "hardware.graphs") and get(tree, "hardware.gpu") == CPU


def shown(tree: Tree, spec: FieldSpec, plan: Plan | None) -> tuple[str, str]:
    """A field's value, and beside it what the planner made of ``auto`` or a note."""
    value = get(tree, spec.key)
    if value == "auto" and spec.resolved and plan is not None:
        return "auto", spec.resolved(plan)
    if spec.key == "model" and plan is not None:
        return value, f"{format.count(plan.model.parameters)} parameters"
    if spec.key == "batch_size" and plan is not None and spec.resolved:
        return value, spec.resolved(plan).partition(" ")[2]
    return value, ""


def field_of(where: str) -> str:
    """The field that an error's ``where`` points at, or an empty string: ``recipe: tuning.rank`` is ``tuning.rank``."""
    named = where.rpartition(": ")[2]
    for spec in (*FIELDS, *LAUNCH_FIELDS):
        if named == spec.key or named.startswith(f"{spec.key}."):
            return spec.key
    return {"tuning": "tuning.type", "hardware": "hardware.gpu", "batch_tokens": "batch_size"}.get(named, "")


def recipe_of(tree: Tree) -> Recipe:
    """The recipe that a form stands for.

    Raises:
        RecipeError: a field holds something that can't be.
    """
    from ..planner.recipe import Recipe

    return Recipe.build({**tree, "model": tree.get("model") or ""}, source="form")
