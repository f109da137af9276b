"""The ``optimizer`` section of a recipe: how parameters are updated, and how the learning rate moves."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from .options import LOW_RANK, OptimizerOptions
from .section import Auto, Section

OptimizerName = Literal[
    "auto", "adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "sgd", "adafactor", "lion", "lion-8bit",
    "paged-lion-8bit", "muon", "galore", "apollo", "apollo-mini", "schedule-free",
    "adopt", "came",
]  # fmt: skip
Schedule = Literal["cosine", "linear", "constant", "wsd", "inverse-sqrt", "cosine-restarts"]

_ADAM = {"adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "galore", "apollo", "apollo-mini", "schedule-free"}
_LION = {"lion", "lion-8bit", "paged-lion-8bit"}
#: Key to the optimisers on which it has an effect. ``auto`` is always an AdamW.
_WORKS_ON: dict[str, set[str]] = {
    "betas": {"auto", "muon", "adopt", "came", *_ADAM, *_LION},
    "epsilon": {"auto", *_ADAM},
    "momentum": {"sgd", "muon"},
    "projection_rank": {"galore", "apollo"},
    "projection_every": {"galore", "apollo", "apollo-mini"},
    "projection_scale": set(LOW_RANK),
}
#: Key to the schedules on which it has an effect.
_SHAPES: dict[str, set[str]] = {
    "min_rate": {"cosine", "linear", "wsd"},
    "cycles": {"cosine-restarts"},
    "decay_ratio": {"wsd"},
}


class Optimizer(Section):
    """How parameters are updated."""

    name: OptimizerName = "auto"
    """``auto`` is AdamW, in 8 bits where memory is short. ``paged-`` states move to host memory when the GPU is full.
    ``muon`` (for matrices; AdamW for the rest), ``galore``, ``apollo`` and ``adafactor`` keep smaller states;
    ``schedule-free`` averages weights instead of lowering the rate. ``adopt`` is an AdamW that converges with any
    betas (arXiv:2411.02853), ``came`` an adafactor that trusts steady updates more (arXiv:2307.02047)."""
    learning_rate: float | Auto = Field("auto")
    """Peak learning rate. ``auto`` is 2e-4 for adapters, 1e-5 for full fine-tuning."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after warm-up; ``wsd`` stays at the peak and falls at the end."""
    warmup_ratio: float = Field(0.03, ge=0.0, le=1.0)
    """Share of all steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    betas: Auto | Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = "auto"
    """Decay rates of the two running means. ``auto`` is 0.9 and 0.999; of lion 0.9 and 0.99; of adopt 0.9 and
    0.9999."""
    epsilon: float = Field(1e-8, gt=0.0)
    """Added to the root of the second moment."""
    momentum: Auto | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    """sgd, muon: share of the last update in the next. ``auto`` is 0 for sgd, 0.95 for muon."""
    projection_rank: Auto | Annotated[int, Field(ge=1)] = "auto"
    """galore, apollo: rank of the space in which states are kept. ``auto`` is 128."""
    projection_every: int = Field(200, ge=1)
    """galore, apollo: steps after which that space is chosen anew."""
    projection_scale: Auto | Annotated[float, Field(gt=0.0)] = "auto"
    """galore, apollo: factor on the update. ``auto`` is 0.25 for galore, 1 for apollo, √128 for apollo-mini."""
    min_rate: float = Field(0.0, ge=0.0, lt=1.0)
    """Where the schedule ends, as a share of the peak rate."""
    cycles: int = Field(2, ge=2)
    """cosine-restarts: how often the rate falls."""
    decay_ratio: float = Field(0.2, gt=0.0, le=1.0)
    """wsd: share of all steps at the end in which the rate falls (arXiv:2404.06395)."""

    @model_validator(mode="before")
    @classmethod
    def _no_schedule(cls, tree: Any) -> Any:
        """Schedule-free training has a constant rate; who writes nothing gets it."""
        if isinstance(tree, dict) and tree.get("name") == "schedule-free":
            return {"schedule": "constant", **tree}
        return tree

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.learning_rate != "auto" and self.learning_rate > 100:
            raise ValueError("learning_rate is above 100, at which nothing is learned||Use 2e-4, or auto.")
        if self.learning_rate != "auto" and self.learning_rate <= 0:
            raise ValueError("learning_rate must be above 0||Try 2.0e-4 for adapters or 1.0e-5 for full fine-tuning.")
        if self.name == "schedule-free" and self.schedule != "constant":
            raise ValueError("schedule-free has no schedule||Remove schedule, or use another optimiser.")
        for key, names in _WORKS_ON.items():
            if self._differs(key) and self.name not in names:
                raise ValueError(
                    f"{key} has no effect on {self.name}||Remove it; it is for {', '.join(sorted(names))}."
                )
        for key, names in _SHAPES.items():
            if self._differs(key) and self.schedule not in names:
                what = f"{key} has no effect on schedule {self.schedule}"
                raise ValueError(f"{what}||Remove it; it is for {', '.join(sorted(names))}.")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError("warmup_ratio and decay_ratio come to more than all steps||Lower one of them.")
        return self

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @property
    def options(self) -> OptimizerOptions:
        """What goes beyond name, rate, decay and clipping, as a value that can be compared and hashed."""
        auto = {"betas": (), "momentum": 0.0, "projection_rank": 0, "projection_scale": 0.0}
        chosen = {field.name: getattr(self, field.name) for field in fields(OptimizerOptions)}
        return OptimizerOptions.read({k: auto[k] if v == "auto" else v for k, v in chosen.items()})
