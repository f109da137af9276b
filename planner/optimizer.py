"""The ``optimizer`` section of a recipe: how parameters are updated."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .section import Auto, Section

OptimizerName = Literal["auto", "adamw", "adamw-8bit", "paged-adamw-8bit", "sgd", "adafactor"]


class Optimizer(Section):
    """How parameters are updated."""

    name: OptimizerName = "auto"
    """``auto`` is AdamW, in 8 bits where memory is short."""
    learning_rate: float | Auto = Field("auto")
    """Peak learning rate. ``auto`` is 2e-4 for adapters, 1e-5 for full fine-tuning."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.03, ge=0.0, le=1.0)
    """Share of all steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Gradients are scaled down to this norm; 0 leaves them as they are."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.learning_rate != "auto" and self.learning_rate <= 0:
            raise ValueError("learning_rate must be above 0||Try 2.0e-4 for adapters or 1.0e-5 for full fine-tuning.")
        return self
