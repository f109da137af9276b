"""The ``tuning`` section of a recipe: which parameters are trained, and how the frozen ones are stored."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .section import Auto, Section

TuningType = Literal["full", "lora", "qlora"]


class Tuning(Section):
    """Which parameters are trained."""

    type: TuningType = "lora"
    """``full`` trains every weight; ``lora`` adds low-rank adapters; ``qlora`` adds them to a 4-bit base."""
    rank: int = Field(16, ge=1, le=4096)
    """Rank r of the adapters."""
    alpha: float | Auto = "auto"
    """The adapters' scale is alpha / rank. ``auto`` is twice the rank."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapters' input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear modules that get an adapter, or all of them but the output head."""
    quantization: Literal["auto", "none", "nf4"] = "auto"
    """Storage of the frozen weights: ``auto`` is NF4 with double quantisation for qlora, none otherwise."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.type == "full":
            if self.quantization == "nf4":
                raise ValueError(
                    "full fine-tuning can't train 4-bit weights||Use type: qlora, or leave out quantization."
                )
            useless = sorted(self.model_fields_set & {"rank", "alpha", "dropout", "targets"})
            if useless:
                raise ValueError(f"{', '.join(useless)} has no effect when type is full||Remove it, or use type: lora.")
        if self.type == "lora" and self.quantization == "nf4":
            raise ValueError("lora on NF4 weights is called qlora||Use type: qlora.")
        if self.type == "qlora" and self.quantization == "none":
            raise ValueError("qlora without quantisation is called lora||Use type: lora.")
        return self
