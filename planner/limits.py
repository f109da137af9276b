"""What a run may use and how far it may go: the sections hardware, limits, checkpoint and evaluation of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .section import Auto, Section

Precision = Literal["auto", "bf16", "bf16-mixed", "fp16", "fp32"]


class HardwareRequest(Section):
    """What the run may use, and how."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto`` is CUDA where there is a GPU, else the CPU."""
    gpu: str | None = None
    """Plan for this GPU of the catalog instead of for this machine."""
    gpus: Auto | Annotated[int, Field(ge=1, le=2**16)] | list[Annotated[int, Field(ge=0, lt=2**16)]] = "auto"
    """How many GPUs, or which (``[0, 1]``). On the CPU: how many processes."""
    strategy: Literal["auto", "single", "ddp", "fsdp"] = "auto"
    """How several GPUs share the work: under ``ddp`` each holds the whole model, ``fsdp`` splits it among them."""
    checkpointing: Literal["auto", "none", "selective", "offload", "full"] = "auto"
    """Activation checkpointing: recompute layers in the backward pass instead of keeping what they made. ``selective``
    recomputes as many as memory asks for, ``offload`` lets less be recomputed by keeping it in host memory."""
    kept_layers: Auto | Annotated[int, Field(ge=1)] = "auto"
    """How many of the last layers are not recomputed under ``selective``; ``auto`` is as many as fit."""
    precision: Precision = "auto"
    """``bf16`` keeps weights in 16 bits, ``bf16-mixed`` and ``fp16`` compute in 16 bits over fp32 weights."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Fused Triton kernels. ``auto`` uses those that prove themselves on this GPU."""
    shared: bool = False
    """Start although another run of finetui is at work on one of these GPUs."""
    graphs: Auto | bool = "auto"
    """Replay steps as CUDA graphs: for small models, whose kernels end sooner than the host launches the next. For sft
    and pretrain on one GPU. ``auto`` does so for adapters on packed rows, where that is predicted to pay."""
    usd_per_h: float | None = Field(None, gt=0)
    """What the machine costs per hour; without it a local one is free and others cost their cheapest offer."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kept_layers != "auto" and self.checkpointing != "selective":
            raise ValueError("kept_layers has no effect here||Remove it, or use checkpointing: selective.")
        return self


class AtEnd(Section):
    """What happens once a run has ended by itself: not when you stop it, nor when the machine is taken away."""

    do: Literal["nothing", "command", "shutdown"] = "nothing"
    """``shutdown`` turns the machine off, so that it stops costing; ``command`` runs one of yours."""
    command: str = ""
    """For ``do: command``: a line for the shell, run in the run's folder with FINETUI_RUN, FINETUI_STATE and
    FINETUI_CAUSE set."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.do == "command" and not self.command.strip():
            raise ValueError("do: command needs a command||Add one, such as command: runpodctl stop pod MY_POD")
        if self.command and self.do != "command":
            raise ValueError("command has no effect here||Set do: command, or remove it.")
        return self


def _at_end(value: Any) -> Any:
    return {"do": value} if isinstance(value, str) else value


class Limits(Section):
    """When a run is ended early, when it is started again, and what happens after it."""

    cost_usd: float | None = Field(None, gt=0)
    """Stop with a checkpoint before this much is spent; on your own machine, give hardware.usd_per_h too."""
    hours: float | None = Field(None, gt=0)
    """Stop with a checkpoint after this long."""
    nan_steps: int = Field(3, ge=1)
    """Fail after so many steps in a row whose loss or gradient is not finite, or whose loss explodes. The weights are
    not updated with such a step."""
    explosion: Auto | Annotated[float, Field(gt=0)] | None = "auto"
    """A loss so far above the median of the latest steps explodes, in nats per token; ``null`` never. ``auto`` is 5
    for sft and pretrain; the losses of other methods have no such scale."""
    hang_s: float | None = Field(600.0, ge=1)
    """A rank without a sign of life for so many seconds hangs; ``null`` never looks."""
    restarts: int = Field(3, ge=0)
    """Go on from the last checkpoint by itself so many times in a row without a new one between them: after a hang, a
    rank that was killed, a GPU that failed, or out of memory where a smaller micro_batch fits."""
    grace_s: float = Field(30.0, ge=2)
    """Seconds that this machine gives between SIGTERM and SIGKILL: 30 in most clouds, 10 under ``docker stop``."""
    preemption: Literal["auto", "off"] = "auto"
    """``auto`` asks the metadata service of AWS, Google Cloud or Azure, on their machines, whether this one will be
    taken away."""
    preemption_command: str | None = None
    """Ask this instead, every five seconds: a line for the shell that exits with 0 once the machine will be taken."""
    at_end: Annotated[AtEnd, BeforeValidator(_at_end)] = AtEnd()
    """``nothing``, ``shutdown``, or ``{do: command, command: ...}``."""

    @model_validator(mode="after")
    def _asked_once(self) -> Self:
        if self.preemption_command is not None and self.preemption == "off":
            raise ValueError("preemption_command has no effect with preemption: off||Remove one of them.")
        return self


class CheckpointPolicy(Section):
    """When the state of a run is written down."""

    every: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1, le=10**6)
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
