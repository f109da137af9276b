"""Settings: what of a plan decides over memory and speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .methods import METHODS
from .options import OptimizerOptions, TuningOptions
from .passes import Passes, usual
from .plan import Checkpointing
from .sharding import STRATEGIES, Strategy
from .stacks import Stack

_TUNING, _OPTIMIZER = TuningOptions(), OptimizerOptions()


@dataclass(frozen=True)
class Settings:
    """What of a plan decides over memory and speed. Widths, dtypes and names as in :class:`.plan.Resolved`."""

    tuning: Literal["full", "lora", "qlora"]
    sequence_length: int
    micro_batch: int = 1
    accumulation: int = 1
    rank: int = 16
    dropout: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    dora: bool = False
    """Weights split into magnitude and direction (arXiv:2402.09353)."""
    kind: str = ""
    """The recipe's type of tuning where it is none of these three: ``tuning`` then is the one that stores and keeps
    most alike."""
    trained: int = 0
    """Parameters that are trained, where that was counted elsewhere; 0: as many as the tuning has."""
    options: TuningOptions = _TUNING
    updates: OptimizerOptions = _OPTIMIZER
    quantization: Literal["none", "nf4", "nf4-single", "int8", "gptq", "fp8"] = "none"
    precision: Literal["bf16", "bf16-mixed", "fp16", "fp32"] = "bf16"
    optimizer: str = "adamw"
    checkpointing: Checkpointing = "full"
    kept_layers: int = 0
    """How many of the last layers keep everything under ``selective`` checkpointing."""
    keeps_outputs: bool = False
    """Layers that compute again keep what attention and every other product gave (torchtitan's ``selective`` of
    operations)."""
    attention: Literal["sdpa", "eager", "flash"] = "sdpa"
    """``flash``: FlashAttention-2 by its own package, which other programs use; it is handed no masks."""
    world_size: int = 1
    strategy: str = "ddp"
    """A name in :data:`.sharding.STRATEGIES`; without effect on one device."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What waits in host memory: the optimiser's states and masters, or the weights and gradients too."""
    kernels: bool = True
    """Whether finetui's own kernels may run; other stacks have none."""
    graphs: bool = False
    """Whether steps are replayed as CUDA graphs: gradients then stay, and each stream has its workspaces."""
    method: str = "sft"
    """A name in :data:`.methods.METHODS`."""
    passes: Passes | None = None
    """What the method holds and computes beside its trained passes; None is what TRL's trainers do."""
    fp8_products: bool = False
    """Weights that are trained in 16 or 32 bits are multiplied in 8 (Transformer Engine, torchao's float8)."""
    optimizer_in_backward: bool = False
    """Each gradient is applied and freed as soon as it is there."""
    masked: bool = False
    """Whether attention gets an explicit mask, as it does for padded and for packed rows under SDPA."""
    varies: bool = False
    """Whether rows of many lengths make micro-batches of many, of which this is the widest. A plan leaves it out: what
    the allocator then holds in vain it gives back before it would run short (:func:`.memory.slack_bytes`)."""

    @property
    def rows(self) -> int:
        """Sequences of one micro-batch on one device: both halves of a pair count."""
        return self.micro_batch * METHODS[self.method].sequences

    @property
    def beside(self) -> Passes:
        """What is held and computed beside the trained passes."""
        full = self.tuning == "full"
        return self.passes or usual(self.method, full=full, sequence_length=self.sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one device."""
        return self.rows * self.sequence_length

    @property
    def graded(self) -> int:
        """Tokens of one micro-batch whose logits are made: of what was generated, the completions alone."""
        completion = self.beside.completion
        return self.rows * min(completion, self.sequence_length) if completion else self.tokens

    @property
    def weight_bytes(self) -> int:
        """Bytes per stored weight: mixed precision trains fp32 masters, a frozen base is stored as it computes."""
        if self.precision != "fp32" and self.sharing.masters:
            return 2  # the masters are among the optimiser's states
        if self.precision == "bf16" or (self.precision == "fp16" and self.tuning != "full"):
            return 2
        return 4

    @property
    def worked_bytes(self) -> int:
        """Bytes per weight as a layer is handed it: what is gathered in 16 bits needs no copies of its own."""
        return self.compute_bytes if self.sharing.lowers else self.weight_bytes

    @property
    def between(self) -> str:
        """The precision of what passes from layer to layer: sharded mixed precision computes as pure 16 bits do."""
        mixed = self.precision == "bf16-mixed" and self.tuning == "full" and self.sharing.lowers
        return "bf16" if mixed else self.precision

    def kept(self, layers: int) -> int:
        """How many of so many layers compute nothing again in backward."""
        return {"none": layers, "selective": min(self.kept_layers, layers)}.get(self.checkpointing, 0)

    def recomputed(self, layers: int) -> float:
        """The share of so many layers that compute again in backward."""
        return 1.0 - self.kept(layers) / max(layers, 1)

    @property
    def sharing(self) -> Strategy:
        alone = self.world_size == 1 and not self.strategy.startswith("zero")  # DeepSpeed keeps its masters there too
        return STRATEGIES["single" if alone else self.strategy]

    @property
    def quantized(self) -> bool:
        return self.quantization != "none"

    @property
    def compute_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def under(self, stack: Stack) -> Settings:
        """As the stack runs them: accelerate shards what is trained as fp32 masters, whatever it was loaded in."""
        whole = self.tuning == "full" and self.precision == "bf16" and not self.sharing.masters
        if not (whole and stack.upcasts_shards and self.sharing.lowers):
            return self
        return replace(self, precision="bf16-mixed")

    def adapter_bytes(self, stack: Stack) -> int:
        if self.precision in ("fp32", "fp16"):  # the gradient scaler of fp16 needs fp32 parameters
            return 4
        return stack.adapter_bytes_4bit if self.quantized else stack.adapter_bytes
