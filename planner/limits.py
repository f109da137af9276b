"""What a run may use and how far it may go: the sections hardware, limits, checkpoint and evaluation of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .section import Auto, Section

Precision = Literal["auto", "bf16", "bf16-mixed", "fp16", "fp32"]


class HardwareRequest(Section):
    """What the run may use, and how."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto`` is CUDA where there is a GPU, else the CPU."""
    gpu: str | None = None
    """Plan for this GPU of the catalog instead of for this machine."""
    gpus: Auto | Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=0)]] = "auto"
    """How many GPUs, or which (``[0, 1]``). On the CPU: how many processes."""
    strategy: Literal["auto", "single", "ddp"] = "auto"
    """How several GPUs share the work."""
    checkpointing: Literal["auto", "none", "selective", "offload", "full"] = "auto"
    """Activation checkpointing: recompute layers in the backward pass instead of keeping what they made. ``selective``
    recomputes as many as memory asks for, ``offload`` lets less be recomputed by keeping it in host memory."""
    kept_layers: Auto | Annotated[int, Field(ge=1)] = "auto"
    """How many of the last layers are not recomputed under ``selective``; ``auto`` is as many as fit."""
    precision: Precision = "auto"
    """``bf16`` keeps weights in 16 bits, ``bf16-mixed`` and ``fp16`` compute in 16 bits over fp32 weights."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Fused Triton kernels. ``auto`` uses those that prove themselves on this GPU."""
    usd_per_h: float | None = Field(None, gt=0)
    """What the machine costs per hour; without it a local one is free and others cost their cheapest offer."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kept_layers != "auto" and self.checkpointing != "selective":
            raise ValueError("kept_layers has no effect here||Remove it, or use checkpointing: selective.")
        return self


class Limits(Section):
    """When a run is ended early."""

    cost_usd: float | None = Field(None, gt=0)
    """Stop with a checkpoint before this much is spent; on your own machine, give hardware.usd_per_h too."""
    hours: float | None = Field(None, gt=0)
    """Stop with a checkpoint after this long."""
    nan_steps: int = Field(3, ge=1)
    """Fail after so many steps in a row whose loss or gradient is not finite."""


class CheckpointPolicy(Section):
    """When the state of a run is written down."""

    every: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """How many of the latest checkpoints stay on disk."""


class Evaluation(Section):
    """Loss on held-out data."""

    every: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Steps between evaluations; there is one at the start and one at the end in any case."""
    holdout: Auto | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    """Share of the training rows that is held out when no source has split: eval. ``auto`` is 5%, at most 200 rows."""
    keep_best: bool = False
    """Keep the weights that did best on held-out rows, and make them the result."""
    patience: int | None = Field(None, ge=1)
    """End after so many evaluations in a row without improvement; the best weights are the result then."""
