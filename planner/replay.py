"""Whether steps are replayed as CUDA graphs, where the recipe leaves that open.

A replayed step waits for no launch, and that is all it gains: it pays where the host takes longer to start the kernels
of a small model than the GPU takes to run them. It costs the calls and checks before each shape of micro-batch is
recorded, and memory that the graphs keep between steps. So it is chosen where shapes are few (packed rows), steps are
many, a tenth of the memory stays free, and the predicted step is shorter by more than predictions are off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .candidate import Candidate

if TYPE_CHECKING:
    from .recipe import Recipe

METHODS = ("sft", "pretrain")
#: Fewer micro-batches would not pay for recording.
FEWEST = 200
#: Of the memory, for what a pool of graphs rounds up and keeps while the optimiser runs.
FREE = 0.1
#: By how much a step has to be shorter.
GAIN = 0.05


def obstacle(recipe: Recipe, chosen: Candidate, *, whole_layers: bool, packing: bool, steps: int) -> str:
    """Why steps of this plan are launched kernel by kernel whatever that costs; empty if they may be replayed.

    Args:
        chosen: the plan as it would run without graphs.
        whole_layers: every layer runs as one function of ours, on a GPU.
        packing: rows are packed, so that their shapes are few.
    """
    settings = chosen.settings
    if recipe.method not in METHODS or settings.world_size > 1:
        return f"only {' and '.join(METHODS)} on one GPU are replayed"
    if not whole_layers:
        return "not every layer is a kernel that never waits for the device"
    if settings.tuning == "full":
        return "the gradients of a whole model would be held beside the graphs"
    if recipe.loss == "eaft" or settings.precision == "fp16" or settings.checkpointing == "offload":
        return "the host looks into each step"
    if settings.dropout or recipe.neftune_alpha:
        return "dropout and noise are drawn anew in every step"
    if not packing:
        return "rows differ in length, and each shape has to be recorded"
    if steps * settings.accumulation < FEWEST:
        return f"fewer than {FEWEST} micro-batches do not pay for recording them"
    return ""


def pays(chosen: Candidate, replayed: Candidate, limit_gib: float) -> str:
    """Why the same plan with graphs is better, in words; empty if it is not, or leaves too little memory."""
    if replayed.memory.high_gib > (1 - FREE) * limit_gib:
        return ""
    now, then = chosen.speed.step_s, replayed.speed.step_s
    if now < (1 + GAIN) * then:
        return ""
    waits = chosen.speed.terms["launch"] - replayed.speed.terms["launch"]
    return f"the GPU would wait {1e3 * waits:.0f} of {1e3 * now:.0f} ms a step for the host to start its kernels"
