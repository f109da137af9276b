"""A trainer's signs of life: at every call of a model that it holds, and whenever it gets on with a step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from ..supervision.heartbeat import Pulse


class Beats(TrainerCallback):
    """Tells the supervisor that this rank gets on.

    A step counts as done when its update is made; the first one compiles kernels and is not held to the limit.
    """

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse

    def feel(self, trainer: Any) -> None:
        """Beat at each call of the trainer's models: its own, a frozen reference, one that judges.

        Every call embeds tokens first, whichever wrapper it came through; a generated token is a call too.
        """
        models = [value for value in vars(trainer).values() if isinstance(value, torch.nn.Module)]
        embeddings = [layer for model in models for layer in model.modules() if isinstance(layer, torch.nn.Embedding)]
        self.pulse.feel(*dict.fromkeys(embeddings))

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """The rows of a step are there."""
        self.pulse.beat()

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """A micro-batch is computed, perhaps as a graph, which calls no module."""
        self.pulse.beat()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """An update is made."""
        self.pulse.beat(state.global_step)

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """A checkpoint is written."""
        self.pulse.beat()
