"""What the untouched base model makes of the held-out rows: the figures that later ones are compared with.

Both the loss and the answers take seconds that the first step should not wait for. Adapters start at zero, so with them
switched off the base model can still be asked after the first step, when a mistake in the recipe would have shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def can_wait(model: Any) -> bool:
    """Whether the model with its adapters off is, at any later time, the model that training begins with.

    So it is for pairs whose B is zero still, if nothing but such pairs is trained.
    """
    if not hasattr(model, "disable_adapter"):
        return False
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained or not all("lora_A." in name or "lora_B." in name for name, _ in trained):
        return False
    halves = [p.detach() for name, p in trained if "lora_B." in name]
    return bool(halves) and not torch.stack(torch._foreach_norm(halves)).any()


def ask(trainer: Any, sample: Callable[[int], None]) -> None:
    """Measure and sample the base model as of step 0, in the midst of a run.

    Args:
        sample: lets the trainer's model answer, for the step that it is told.
    """
    step, trainer.state.global_step = trainer.state.global_step, 0
    try:
        with trainer.model.disable_adapter():
            if trainer.held_out is not None:
                trainer.evaluate()
            sample(0)
    finally:
        trainer.state.global_step = step
