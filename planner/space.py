"""The ways to run a recipe that the solver looks at: what the user left open, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .architecture import Architecture
from .errors import HardwareError
from .frame import Frame
from .hardware import Node
from .options import CUDA_ONLY
from .passes import Passes
from .settings import Settings
from .stacks import Stack
from .strategies import Obstacle, Storage, obstacle, ways_to_share

if TYPE_CHECKING:
    from .recipe import Recipe

#: The largest micro-batch that is looked at, and how much larger than the one before each is.
_LARGEST_MICRO_BATCH, _NEXT_MICRO_BATCH = 64, 1.3


@dataclass(frozen=True)
class Space:
    """What can be chosen for one recipe on one machine.

    Args:
        passes: what the method holds and computes beside its trained passes; None: as TRL's trainers do.
    """

    recipe: Recipe
    architecture: Architecture
    node: Node
    stack: Stack
    frame: Frame
    passes: Passes | None = None

    @property
    def obstacle(self) -> Obstacle | None:
        """What keeps finetui's engine from splitting the model."""
        return obstacle(self.recipe, self.architecture, self.node.gpu)

    def ways(self) -> Iterator[tuple[str, Storage]]:
        """Strategy, and precision with optimiser, best first: tried in this order until one fits.

        Raises:
            HardwareError: what was asked for is not to be had on this hardware.
            RecipeError: the model was asked to be split, and can't be.
        """
        own = self.stack.name == "finetui"
        yield from ways_to_share(
            self.recipe, self.storages(), self.obstacle, world=len(self.frame.gpus), own=own, cpu=self.frame.cpu
        )

    def storages(self) -> list[Storage]:
        """Precision and optimiser, best first: what the user left open is tried in this order until it fits."""
        tuning, gpu = self.recipe.tuning.family, self.node.gpu
        asked, optimizer = self.recipe.hardware.precision, self.recipe.optimizer.name
        if (asked == "bf16-mixed" and not gpu.bf16) or (asked == "bf16" and not gpu.bf16):
            do = "Use precision: fp16, or auto."
            raise HardwareError(f"{gpu.name} can't compute in bf16", where="hardware.precision", do=do)
        if asked == "fp16" and self.frame.cpu:
            raise HardwareError("the CPU can't train in fp16", where="hardware.precision", do="Use fp32 or bf16.")
        if asked != "auto":
            precisions: list[str] = [asked]
        elif self.frame.cpu:
            precisions = ["fp32"]
        elif not gpu.bf16:
            precisions = ["fp16"]
        else:
            precisions = ["bf16-mixed", "bf16"] if tuning == "full" else ["bf16"]
        if self.frame.cpu and optimizer in CUDA_ONLY:
            raise HardwareError(f"{optimizer} needs a CUDA GPU", where="optimizer.name", do="Use adamw, or auto.")
        names = [optimizer] if optimizer != "auto" else ["adamw"]
        pairs = [(precision, name) for precision in precisions for name in names]
        if optimizer == "auto" and not self.frame.cpu:
            pairs += [(precisions[-1], "adamw-8bit"), (precisions[-1], "paged-adamw-8bit")]
        return pairs

    def micro_batches(self) -> list[int]:
        """Rows of one micro-batch on one device that divide the batch, fewest first."""
        if self.recipe.micro_batch != "auto":
            return [self.recipe.micro_batch]
        share = max(self.frame.batch // len(self.frame.gpus), 1)
        fewest = 2 if self.recipe.method == "kto" else 1  # its KL needs another row's answer
        sizes: list[int] = []
        for size in range(fewest, min(share, _LARGEST_MICRO_BATCH) + 1):
            if share % size == 0 and size >= _NEXT_MICRO_BATCH * (sizes[-1] if sizes else 0):
                sizes.append(size)
        return sizes or [fewest]

    def settings(self, micro: int, storage: Storage, strategy: str) -> Settings:
        """What a plan with this micro-batch, precision, optimiser and strategy would run with."""
        tuning = self.recipe.tuning
        targets = tuning.targets if isinstance(tuning.targets, str) else tuple(tuning.targets)
        return Settings(
            tuning=tuning.family,
            kind=tuning.type if tuning.type != tuning.family else "",
            options=tuning.options,
            updates=self.recipe.optimizer.options,
            dora=tuning.use_dora,
            method=self.recipe.method,
            kernels=self.recipe.hardware.kernels != "off",
            graphs=self.recipe.hardware.graphs is True,
            sequence_length=self.frame.row_tokens(),
            micro_batch=micro,
            accumulation=max(self.frame.batch // (micro * len(self.frame.gpus)), 1),
            rank=tuning.rank,
            dropout=tuning.dropout > 0,
            targets=targets,
            quantization=tuning.stored,
            precision=storage[0],  # type: ignore[arg-type]
            optimizer=storage[1],
            world_size=len(self.frame.gpus),
            strategy=strategy,
            masked=self.frame.packing or self._masks_padding(micro, storage[0]),
            passes=self.passes,
        )

    def _masks_padding(self, micro: int, precision: str) -> bool:
        """Whether padded rows come with a mask; where the loss takes labelled positions alone, finetui drops it."""
        dropped = self.recipe.method in ("sft", "pretrain", "distill")
        dropped &= self.stack.loss == "rows" and self.stack.name == "finetui"
        dropped &= not self.frame.cpu and precision != "fp16"
        return micro > 1 and not dropped and self.frame.padding_share(micro) < 1.0
