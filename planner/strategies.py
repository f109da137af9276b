"""How finetui's own engine shares a run among several devices, and what keeps it from splitting the model (FSDP2).

DDP comes first: it computes the same and sends least. A model that does not fit on each device whole is split; only
where that can't be done either do optimiser states wait in host memory. What the engine can't split it says here, so
that no run fails at its start for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .architecture import Architecture
from .errors import RecipeError
from .hardware import Gpu
from .options import PAGED

if TYPE_CHECKING:
    from .recipe import Recipe

#: Optimisers that work element by element, or by blocks of neighbours that are one rank's alone, and so on the rows
#: that one rank has of a weight.
SPLITTABLE = frozenset({"adamw", "lion", "sgd", "adopt", "schedule-free", "adamw-8bit", "lion-8bit"} | PAGED)
_METHODS, _TYPES = frozenset({"sft", "pretrain"}), frozenset({"full", "lora", "qlora"})
#: Keys of the tuning whose adapters are no pairs beside linear layers, or begin from the base's own weights.
_PLAIN = {"init": "default", "modules_to_save": (), "new_tokens": (), "target_parameters": (), "start_from": ""}

Storage = tuple[str, str]
"""Precision and optimiser."""


@dataclass(frozen=True)
class Obstacle:
    """Why a run can't be split: ``what`` is in the way, ``where`` in the recipe, what to ``do``."""

    what: str
    where: str
    do: str


def obstacle(recipe: Recipe, architecture: Architecture, gpu: Gpu) -> Obstacle | None:
    """What keeps finetui's engine from splitting this run's model; None if nothing does."""
    from .objective import PREFERENCE_METHODS, objective  # which is part of a recipe, and pydantic's

    tuning, options = recipe.tuning, recipe.tuning.options
    other = "or use hardware.strategy: ddp"
    if recipe.method not in _METHODS | PREFERENCE_METHODS:
        what = f"the models of {recipe.method} are not split: only those of sft, pretrain and preference methods are"
        return Obstacle(what, "method", "Use hardware.strategy: ddp.")
    if recipe.method in PREFERENCE_METHODS and objective(recipe).reference == "copy":
        what = f"the copy of the model that {recipe.method} compares it with can't be split"
        precomputed = "tuning: lora" if recipe.method == "kto" else "preference.reference: precomputed"
        return Obstacle(what, "preference.reference", f"Use {precomputed}, {other}.")
    if recipe.preference.share_prompt is True:
        what = "prompts can't be shared between answers where the model is split"
        return Obstacle(what, "preference.share_prompt", f"Remove it, {other}.")
    if tuning.type not in _TYPES:
        what = f"{tuning.type} can't be split: only tuning full, lora and qlora can"
        return Obstacle(what, "tuning.type", f"Use tuning: lora, {other}.")
    if tuning.type == "qlora" and options.use_dora:
        what = "dora on weights in 4 bits can't be split: its norms are taken of weights that only one rank has read"
        return Obstacle(what, "tuning.use_dora", f"Use tuning: dora on 16 bits, {other}.")
    unusual = [key for key, plain in _PLAIN.items() if getattr(options, key) != plain]
    if unusual:
        what = f"tuning with {unusual[0]} can't be split: only pairs on linear layers can"
        return Obstacle(what, f"tuning.{unusual[0]}", f"Remove it, {other}.")
    if tuning.type != "full" and any(architecture.expert_lora(x, 1, _targets(recipe)) for x in architecture.layers):
        what = "adapters on fused experts can't be split"
        return Obstacle(what, "tuning.targets", f"Name attention's modules alone, {other}.")
    if architecture.packed is not None:
        what = f"a checkpoint stored in {architecture.packed.title} can't be split"
        return Obstacle(what, "model", f"Use one in 16 bits, {other}.")
    if recipe.optimizer.name != "auto" and recipe.optimizer.name not in SPLITTABLE:
        what = f"weights under {recipe.optimizer.name} can't be split: a step has to do with some of their rows alone"
        return Obstacle(what, "optimizer.name", f"Use {', '.join(sorted(SPLITTABLE))}, {other}.")
    if recipe.hardware.precision == "fp16" or (gpu.kind == "cuda" and not gpu.bf16):
        what = "fp16 can't be split: its loss scaler looks at whole gradients"
        return Obstacle(what, "hardware.precision", "Use hardware.strategy: ddp.")
    if recipe.hardware.graphs is True:
        return Obstacle("steps of a model that is split can't be replayed", "hardware.graphs", f"Remove it, {other}.")
    return None


def ways_to_share(
    recipe: Recipe, storages: Sequence[Storage], obstacle: Obstacle | None, *, world: int, own: bool, cpu: bool
) -> Iterator[tuple[str, Storage]]:
    """Strategies with the storages that each goes with, best first.

    Args:
        obstacle: of :func:`obstacle`.
        own: the run is finetui's; of other programs only what the recipe asks for is predicted.

    Raises:
        RecipeError: the model was asked to be split, and can't be.
    """
    asked, named = recipe.hardware.strategy, recipe.optimizer.name

    def split(storages: Sequence[Storage]) -> Iterator[tuple[str, Storage]]:
        # What is split is small: states wait in host memory for it only where the user says so.
        fit = SPLITTABLE - (PAGED - {named})
        return (("fsdp", storage) for storage in storages if not own or storage[1] in fit)

    if asked == "fsdp" and world > 1:
        if own and obstacle is not None:
            raise RecipeError(obstacle.what, where=obstacle.where, do=obstacle.do)
        yield from split(storages)
        return
    # A CPU's processes share one memory, and all of the model is in it while it is read.
    also_split = asked == "auto" and own and world > 1 and obstacle is None and not cpu
    last = [storage for storage in storages if also_split and storage[1] in PAGED]
    first = [storage for storage in storages if storage not in last]
    yield from (("ddp", storage) for storage in first)
    if also_split:
        yield from split(storages)
    yield from (("ddp", storage) for storage in last)


def _targets(recipe: Recipe) -> str | tuple[str, ...]:
    targets = recipe.tuning.targets
    return targets if isinstance(targets, str) else tuple(targets)
