"""Everything that the trainer of a run is made from, whatever its method."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ...planner.plan import Resolved
from ...planner.recipe import Recipe
from ..models.load import Emit, Numerics
from .best import KeepsBest
from .order import Order
from .settings import Length, settings

if TYPE_CHECKING:
    from ..data.prepared import Prepared
    from ..models.sharding import Split
    from ..run import Run
    from .callbacks import Reporter


@dataclass(frozen=True)
class Job:
    """One rank's share of a run, ready to be trained.

    Args:
        folder: where the base model lies.
        model: loaded, adapted and with its kernels.
        resumed: training goes on from a checkpoint.
        split: the model where it is split over the ranks.
        whole_layers: its layers recompute by themselves what they do not keep.
        emit: tells an event on behalf of all ranks.
    """

    run: Run
    recipe: Recipe
    resolved: Resolved
    folder: Path
    tokenizer: Any
    rows: Prepared
    model: Any
    device: torch.device
    order: Order
    length: Length
    reporter: Reporter
    emit: Emit
    resumed: bool
    whole_layers: bool = False
    split: Split | None = None
    teacher: Path | None = None
    """Where the model lies that a student learns from, or what that one's adapter sits on."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What checkpoints note down about the run that they belong to."""

    @property
    def numerics(self) -> Numerics:
        """Formats of weights and arithmetic."""
        return Numerics.of(self.resolved)

    @property
    def multiple_of(self) -> int:
        """Batches are padded to a multiple of so many tokens.

        Attention is planned and kernels are chosen anew for each length on a GPU, which takes up to two seconds: few
        lengths, then.
        """
        return 128 if self.device.type == "cuda" else 1

    def arguments(self) -> dict[str, Any]:
        """Keywords for the configuration class of a trainer of TRL."""
        return settings(
            self.resolved,
            self.length,
            self.run.path / "checkpoints",
            resumed=self.resumed,
            evaluates=self.rows.evaluation is not None,
        )

    def common(self) -> dict[str, Any]:
        """Keywords that :class:`.base.RunTrainer` and every trainer of TRL take."""
        evaluation = self.recipe.evaluation
        callbacks: list[TrainerCallback] = [self.reporter]
        if evaluation.keep_best or evaluation.patience:
            callbacks.append(KeepsBest(self.run, self.tokenizer, self.folder, self.emit, evaluation.patience))
        return {
            "order": self.order,
            "held_out": self.rows.evaluation,
            "keep": self.recipe.checkpoint.keep,
            "emit": self.emit,
            "numerics": self.numerics,
            "resolved": self.resolved,
            "identity": self.identity,
            "split": self.split,
            "model": self.model,
            "train_dataset": self.rows.train,
            "processing_class": self.tokenizer,
            "callbacks": callbacks,
        }
