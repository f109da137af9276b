"""What fits: tunings x GPUs x sequence lengths for one model, each with memory, speed and price."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .architecture import Architecture
from .cost import cheapest_offers
from .hardware import Gpu, Offer, load_catalog
from .memory import peak_memory
from .packed import trainable_as
from .plan import Memory
from .policies import most_layers
from .settings import Settings
from .speed import step_speed
from .stacks import Stack, find_stack

LENGTHS = (1024, 2048, 4096, 8192)
TUNINGS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Fit:
    """One combination. ``usd_per_h`` is the cheapest single GPU on demand, ``None`` where nobody offers it."""

    gpu: str
    memory_gib: float
    tuning: str
    sequence_length: int
    fits: bool
    device_gib: float
    high_gib: float
    tokens_per_s: float
    precision: str
    optimizer: str
    checkpointing: str
    usd_per_h: float | None
    provider: str = ""

    @property
    def usd_per_million_tokens(self) -> float | None:
        """Rent for a million tokens of training."""
        return None if self.usd_per_h is None else self.usd_per_h / 3600 / self.tokens_per_s * 1e6


def fit_table(
    architecture: Architecture,
    gpus: Iterable[Gpu] | None = None,
    *,
    tunings: Sequence[str] = TUNINGS,
    sequence_lengths: Sequence[int] = LENGTHS,
    micro_batch: int = 1,
    rank: int = 16,
    targets: str | Sequence[str] = "all-linear",
    framework: str = "finetui",
    offers: Iterable[Offer] | None = None,
) -> list[Fit]:
    """One row per GPU, tuning and sequence length: the fastest way that fits, or the smallest that doesn't.

    Lengths beyond what the model was made for are left out, unless all are; so are tunings that its weights, packed as
    they are, can't be trained with.

    Raises:
        ModelError: that is each of them.
    """
    if framework == "finetui":
        tunings = trainable_as(architecture.packed, tunings, architecture.name)
    stack = find_stack(framework)
    limit = architecture.max_positions
    lengths = [length for length in sequence_lengths if not limit or length <= limit] or [min(sequence_lengths)]
    best = cheapest_offers(offers)
    names = targets if isinstance(targets, str) else tuple(targets)
    rows = []
    for gpu in load_catalog().values() if gpus is None else gpus:
        offer = best.get((gpu.name, 1))
        for tuning in tunings:
            for length in lengths:
                settings, memory = _best(architecture, gpu, tuning, length, micro_batch, rank, names, framework)
                speed = step_speed(architecture, settings, stack, gpu)
                rows.append(
                    Fit(
                        gpu=gpu.name,
                        memory_gib=gpu.memory_gib,
                        tuning=tuning,
                        sequence_length=length,
                        fits=memory.device_gib <= gpu.memory_gib,
                        device_gib=memory.device_gib,
                        high_gib=memory.high_gib,
                        tokens_per_s=speed.tokens_per_s,
                        precision=settings.precision,
                        optimizer=settings.optimizer,
                        checkpointing=settings.checkpointing,
                        usd_per_h=offer.usd_per_h if offer else None,
                        provider=offer.provider if offer else "",
                    )
                )
    return rows


def _best(
    architecture: Architecture,
    gpu: Gpu,
    tuning: str,
    length: int,
    micro_batch: int,
    rank: int,
    targets: str | tuple[str, ...],
    framework: str,
) -> tuple[Settings, Memory]:
    """The first of the ways to run, fastest first, that fits; else the last, which needs least."""
    stack = find_stack(framework)
    base = Settings(
        tuning=tuning,  # type: ignore[arg-type]
        sequence_length=length,
        micro_batch=micro_batch,
        accumulation=max(16 // micro_batch, 1),
        rank=rank,
        targets=targets,
        quantization="nf4" if tuning == "qlora" else "none",
    )
    settings, memory = None, None
    for settings in _ways(architecture, base, stack, gpu):
        memory = peak_memory(architecture, settings, stack, gpu)
        if memory.high_gib <= gpu.memory_gib:
            break
    assert settings is not None
    assert memory is not None
    return settings, memory


def _ways(architecture: Architecture, base: Settings, stack: Stack, gpu: Gpu) -> Iterator[Settings]:
    """Precision, optimiser and checkpointing in the solver's order."""
    for fastest, least in (storages := _storages(base, gpu.kind, gpu.bf16)):
        yield fastest
        if peak_memory(architecture, least, stack, gpu).high_gib <= gpu.memory_gib:
            most = most_layers(architecture, fastest, stack, gpu, gpu.memory_gib)
            yield most if most.kept_layers else least
        elif least is storages[-1][1]:
            yield least


@lru_cache(maxsize=64)
def _storages(base: Settings, kind: str, bf16: bool) -> list[tuple[Settings, Settings]]:
    """Precisions and optimisers for a kind of device, each without recomputation and with all of it."""
    precision = "fp32" if kind == "cpu" else "bf16" if bf16 else "fp16"
    storages = [(precision, "adamw")]
    if base.tuning == "full":
        if precision == "bf16":
            storages.insert(0, ("bf16-mixed", "adamw"))
        if kind == "cuda":
            storages += [(precision, "adamw-8bit"), (precision, "paged-adamw-8bit")]
    held = [replace(base, precision=name, optimizer=optimizer) for name, optimizer in storages]  # type: ignore[arg-type]
    return [(replace(each, checkpointing="none"), replace(each, checkpointing="full")) for each in held]
