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

if TYPE_CHECKING:
    from .recipe import Recipe

#: Optimisers that work element by element, and so on the rows that one rank has of a weight, in numbers of more than
#: 8 bits, whose scales would span other rows on another number of ranks.
ELEMENTWISE = frozenset({"adamw", "lion", "sgd", "adopt", "schedule-free"})
_METHODS, _TYPES = frozenset({"sft", "pretrain"}), frozenset({"full", "lora"})
#: Keys of the tuning whose adapters are more than plain pairs on linear layers, or begin from the base's own weights.
_PLAIN = {"use_dora": False, "init": "default", "modules_to_save": (), "new_tokens": (), "target_parameters": (),
          "start_from": ""}  # fmt: skip

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
    tuning, options = recipe.tuning, recipe.tuning.options
    other = "or use hardware.strategy: ddp"
    if recipe.method not in _METHODS:
        what = f"the models of {recipe.method} are not split: only those of sft and pretrain are"
        return Obstacle(what, "method", "Use hardware.strategy: ddp.")
    if tuning.type not in _TYPES or tuning.stored != "none":
        what = f"{tuning.type} can't be split: only tuning full, and lora on a 16-bit or fp32 base, can"
        return Obstacle(what, "tuning.type", f"Use tuning: lora, {other}.")
    unusual = [key for key, plain in _PLAIN.items() if getattr(options, key) != plain]
    if unusual:
        what = f"tuning with {unusual[0]} can't be split: only plain LoRA pairs can"
        return Obstacle(what, f"tuning.{unusual[0]}", f"Remove it, {other}.")
    if tuning.type == "lora" and any(architecture.expert_lora(x, 1, _targets(recipe)) for x in architecture.layers):
        what = "adapters on fused experts can't be split"
        return Obstacle(what, "tuning.targets", f"Name attention's modules alone, {other}.")
    if architecture.packed is not None:
        what = f"a checkpoint stored in {architecture.packed.title} can't be split"
        return Obstacle(what, "model", f"Use one in 16 bits, {other}.")
    if recipe.optimizer.name != "auto" and recipe.optimizer.name not in ELEMENTWISE:
        what = f"weights under {recipe.optimizer.name} can't be split: a step has to do with some of their rows alone"
        return Obstacle(what, "optimizer.name", f"Use {', '.join(sorted(ELEMENTWISE))}, {other}.")
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
    asked = recipe.hardware.strategy
    if asked == "fsdp" and world > 1:
        if own and obstacle is not None:
            raise RecipeError(obstacle.what, where=obstacle.where, do=obstacle.do)
        yield from (("fsdp", storage) for storage in storages if not own or storage[1] in ELEMENTWISE)
        return
    # A CPU's processes share one memory, and all of the model is in it while it is read.
    also_split = asked == "auto" and own and world > 1 and obstacle is None and not cpu
    last = [storage for storage in storages if also_split and storage[1].startswith("paged-")]
    yield from (("ddp", storage) for storage in storages if storage not in last)
    if also_split:
        yield from (("fsdp", storage) for storage in storages if storage[1] in ELEMENTWISE)
    yield from (("ddp", storage) for storage in last)


def _targets(recipe: Recipe) -> str | tuple[str, ...]:
    targets = recipe.tuning.targets
    return targets if isinstance(targets, str) else tuple(targets)
