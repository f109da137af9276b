"""Plan: a recipe with no ``auto`` left, what it will need, take and cost, and the reason for each choice.

The JSON form (:meth:`Plan.to_dict`) is a contract: scripts read it and every run keeps it as ``plan.json``. Fields may
be added; those here stay. All memory is in GiB (2**30 bytes) per worst GPU at the peak of a steady step.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from .kinds import strange_field

if TYPE_CHECKING:
    from .options import OptimizerOptions, TuningOptions

#: What a number rests on, weakest first.
Basis = Literal["formula", "calibrated", "exact", "measured"]
#: What layers compute again in backward: nothing; all but the last ``kept_layers`` of them everything; all of them what
#: follows from tensors that waited in host memory; all of them everything.
Checkpointing = Literal["none", "selective", "offload", "full"]


@dataclass(frozen=True)
class Workload:
    """How much there is to train on, in one epoch.

    ``basis`` says where the figures come from: ``counted`` with the tokenizer, ``estimated`` from the size of the
    text, or ``assumed`` when no data was named.
    """

    examples: int
    tokens: int
    longest: int = 0
    eval_examples: int = 0
    basis: Literal["counted", "estimated", "assumed"] = "assumed"

    @property
    def mean_tokens(self) -> float:
        """Tokens per example."""
        return self.tokens / max(self.examples, 1)


@dataclass(frozen=True)
class ModelSummary:
    """The model of a plan: its name, architecture and exact parameter counts."""

    name: str
    parameters: int
    trainable: int
    family: str = ""
    modules: dict[str, int] = field(default_factory=dict)
    """Parameters by kind of module; they add up to ``parameters``."""


@dataclass(frozen=True)
class TeacherSummary:
    """The frozen model that a student learns from; ``download_gib`` is 0 of a folder."""

    name: str
    parameters: int
    quantization: Literal["none", "nf4"] = "none"
    weights_gib: float = 0.0
    download_gib: float = 0.0


@dataclass(frozen=True)
class HardwareSummary:
    """Where a plan runs. ``kind`` is ``cuda`` or ``cpu``; ``memory_gib`` is what one device can really use."""

    gpu: str
    count: int
    memory_gib: float
    kind: Literal["cuda", "cpu"] = "cuda"
    local: bool = False


@dataclass(frozen=True)
class Resolved:
    """Every knob of a recipe with its final value. The engine reads nothing else to decide how to run."""

    method: str
    tuning: str
    rank: int
    alpha: float
    dropout: float
    targets: str | list[str]
    quantization: Literal["none", "nf4", "fp8"]
    sequence_length: int
    micro_batch: int
    accumulation: int
    packing: bool
    train_on: Literal["answers", "last-answer", "all"]
    epochs: float
    steps: int
    warmup_steps: int
    optimizer: str
    learning_rate: float
    schedule: str
    weight_decay: float
    max_grad_norm: float
    precision: Literal["bf16", "bf16-mixed", "fp16", "fp32"]
    checkpointing: Checkpointing
    attention: Literal["sdpa", "eager"]
    kernels: Literal["auto", "on", "off"]
    strategy: Literal["single", "ddp", "fsdp"]
    device: Literal["cuda", "cpu"]
    gpus: list[int]
    checkpoint_every: int
    eval_every: int
    seed: int
    kept_layers: int = 0
    """Under ``selective`` checkpointing: so many of the last layers keep what the others compute again."""

    graphs: bool = False
    """Whether steps are replayed as CUDA graphs."""
    tuning_options: dict[str, Any] = field(default_factory=dict)
    """What of the tuning goes beyond rank, alpha, dropout and targets and differs from the default."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """The same of the optimiser and its schedule."""
    neftune_alpha: float = 0.0
    """Size of the noise on input embeddings; 0 is none."""

    @property
    def trains_base(self) -> bool:
        """Whether the model's own weights are trained, and the result is a model instead of an adapter."""
        return self.tuning in ("full", "freeze")

    @property
    def options(self) -> TuningOptions:
        """``tuning_options`` with the defaults of what they leave out."""
        from .options import TuningOptions

        return TuningOptions.read(self.tuning_options)

    @property
    def updates(self) -> OptimizerOptions:
        """``optimizer_options`` with the defaults of what they leave out."""
        from .options import OptimizerOptions

        return OptimizerOptions.read(self.optimizer_options)

    @property
    def world_size(self) -> int:
        """How many ranks train."""
        return max(len(self.gpus), 1)

    @property
    def batch_size(self) -> int:
        """Sequences per optimiser step over all ranks."""
        return self.micro_batch * self.accumulation * self.world_size


@dataclass(frozen=True)
class Memory:
    """Peak memory of one GPU.

    ``allocated_gib`` predicts ``torch.cuda.max_memory_allocated``, ``reserved_gib`` predicts ``max_memory_reserved``
    and ``device_gib`` what NVML shows for the device, with the CUDA context. ``terms`` add up to ``device_gib`` at the
    binding ``moment``. ``low_gib`` to ``high_gib`` is the interval around ``device_gib``; ``margins`` holds half the
    width of each of ``allocated``, ``reserved`` and ``device``.
    """

    allocated_gib: float
    reserved_gib: float
    device_gib: float
    low_gib: float
    high_gib: float
    terms: dict[str, float] = field(default_factory=dict)
    moment: Literal["loss", "backward", "optimizer", "rollout", "teacher"] = "backward"
    lever: str = ""
    margins: dict[str, float] = field(default_factory=dict)
    moments: dict[str, float] = field(default_factory=dict)
    """What is allocated at the fullest instant of each moment, in GiB; only where a step was followed."""


@dataclass(frozen=True)
class Disk:
    """What a run writes, in GiB: one checkpoint; all that lie there at a time, with the one being written; the result,
    with the weights that did best if they are kept."""

    checkpoint_gib: float = 0.0
    checkpoints_gib: float = 0.0
    output_gib: float = 0.0


@dataclass(frozen=True)
class Speed:
    """Time of one optimiser step. ``terms`` are seconds per step and add up to ``step_s``; ``low_tokens_per_s`` to
    ``high_tokens_per_s`` is the interval around ``tokens_per_s`` (zeros in plans of earlier releases)."""

    tokens_per_s: float
    step_s: float
    mfu: float
    terms: dict[str, float] = field(default_factory=dict)
    low_tokens_per_s: float = 0.0
    high_tokens_per_s: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What the run costs at one offer; ``usd`` is 0 on hardware that is already there.

    ``stale`` marks a price that is undated or older than 90 days.
    """

    usd: float = 0.0
    usd_per_h: float = 0.0
    provider: str = ""
    as_of: str = ""
    stale: bool = False


@dataclass(frozen=True)
class Reason:
    """Why a setting has its value."""

    setting: str
    value: Any
    why: str


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan: the figures of its own plan that a table of stages shows; zero where nothing is trained."""

    name: str
    do: str
    method: str = ""
    tuning: str = ""
    trainable: int = 0
    steps: int = 0
    fits: bool = True
    device_gib: float = 0.0
    tokens_per_s: float = 0.0
    time_s: float = 0.0
    usd: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A recipe with no ``auto`` left, with its predicted memory, speed, time and cost."""

    model: ModelSummary
    hardware: HardwareSummary
    fits: bool
    memory: Memory
    speed: Speed
    time_s: float
    cost: Cost
    resolved: Resolved
    workload: Workload
    reasons: list[Reason] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    basis: Basis = "formula"
    correction: dict[str, float] = field(default_factory=dict)
    """Factors on the formula's ``memory`` (what moves) and ``speed`` that finished runs gave; empty without any."""
    stages: list[StagePlan] = field(default_factory=list)
    """Of a recipe with stages: one row for each. ``time_s`` and ``cost`` are then those of all, the other figures those
    of the one that needs most memory."""
    disk: Disk = Disk()
    """What checkpoints and result take."""
    teacher: TeacherSummary | None = None
    """Of method distill; its weights are among those of ``memory``."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The JSON form as text, figures rounded to what they are worth."""
        return json.dumps(_rounded(self.to_dict()), indent=2, ensure_ascii=False)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Self:
        """Read the JSON form; unknown fields (of a later release) are ignored."""
        return cls(
            model=_read(ModelSummary, tree["model"]),
            hardware=_read(HardwareSummary, tree["hardware"]),
            fits=tree["fits"],
            memory=_read(Memory, tree["memory"]),
            speed=_read(Speed, tree["speed"]),
            time_s=tree["time_s"],
            cost=_read(Cost, tree["cost"]),
            resolved=_read(Resolved, tree["resolved"]),
            workload=_read(Workload, tree["workload"]),
            reasons=[_read(Reason, reason) for reason in tree.get("reasons", [])],
            warnings=list(tree.get("warnings", [])),
            basis=tree.get("basis", "formula"),
            correction=dict(tree.get("correction", {})),
            stages=[_read(StagePlan, stage) for stage in tree.get("stages", [])],
            disk=_read(Disk, tree.get("disk", {})),
            teacher=_read(TeacherSummary, tree["teacher"]) if tree.get("teacher") is not None else None,
        )

    def save(self, path: str | Path) -> None:
        """Write the JSON form to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by :meth:`save`."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _read(cls: type, tree: dict[str, Any]) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"its {cls.__name__.lower()} is no object")
    strange = strange_field(cls, tree)
    if strange is not None:
        raise ValueError(f"{strange} of its {cls.__name__.lower()} is of another kind than it should be")
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in tree.items() if key in known})


def _rounded(value: Any, key: str = "") -> Any:
    if isinstance(value, float) and key not in {"learning_rate", "alpha", "dropout", "epochs"}:
        return round(value, 4)
    if isinstance(value, dict):
        return {k: _rounded(v, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
