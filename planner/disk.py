"""What a run writes to disk: checkpoints, as many as are kept and one that is being written, and the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .architecture import Architecture
from .options import LOW_RANK
from .plan import Disk
from .settings import Settings
from .storage import ADAM32_BYTES, low_rank_bytes, optimizer_bytes

if TYPE_CHECKING:
    from .recipe import Recipe

_GIB = 2**30
#: Tokenizer, configs, random states and file headers; the tokenizers of public models take 2 to 33 MB.
_REST = 40 * 10**6


def disk_of(recipe: Recipe, architecture: Architecture, settings: Settings, trainable: int) -> Disk:
    """The disk that a run takes.

    A checkpoint holds what is trained as it is trained (adapters in fp32; of a full or partly frozen model all weights,
    so that it loads by itself) and the optimiser's states, paged ones included.

    Args:
        trainable: parameters that are trained.
    """
    full = settings.tuning == "full"
    width = settings.weight_bytes if full else 4
    stored = architecture.parameters if full else trainable
    weights = float(stored * width)
    if not full and settings.options.init in ("pissa", "olora", "eva"):
        weights *= 2  # an adapter that plain PEFT loads takes its beginning off again, which doubles its rank
    if settings.kind == "adalora":
        weights += 16.0 * trainable  # all parameters at their first rank, and three figures of their importance
    best = weights if recipe.evaluation.keep_best or recipe.evaluation.patience else 0.0
    checkpoint = weights + _states(architecture, settings, trainable, width) + _REST
    return Disk(
        checkpoint_gib=checkpoint / _GIB,
        checkpoints_gib=(recipe.checkpoint.keep + 1) * checkpoint / _GIB,
        output_gib=(weights + best + 2 * _REST) / _GIB,
    )


def _states(architecture: Architecture, settings: Settings, trainable: int, width: int) -> float:
    name = settings.optimizer.removeprefix("paged-")
    full = settings.tuning == "full"
    if name in LOW_RANK and full:
        return low_rank_bytes(architecture, name, settings.updates) * trainable
    states = optimizer_bytes(name, width)[0] * trainable
    if name.endswith("8bit") and full:
        states += (ADAM32_BYTES - states / trainable) * architecture.vocab * architecture.hidden
    return states
