"""Where a plan does not fit: the nearest changes that would make it fit, each with what it costs in time or money."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .architecture import Architecture
from .cost import cheapest_offers
from .hardware import Gpu, Node, load_catalog
from .memory import peak_memory
from .settings import Settings
from .speed import step_speed
from .stacks import Stack


@dataclass(frozen=True)
class Remedy:
    """One change that makes a run fit.

    ``hours`` and ``usd`` are for its steps alone, over all tokens of the run; ``usd`` is None on hardware without a
    price.
    """

    change: str
    device_gib: float
    memory_gib: float
    hours: float
    usd: float | None = None
    usd_per_h: float | None = None
    provider: str = ""

    def __str__(self) -> str:
        takes = f"{self.hours:.1f} h" if self.hours >= 1 else f"{60 * self.hours:.0f} min"
        price = f" and {self.usd:.2f} USD ({self.provider}, {self.usd_per_h:.2f} an hour)" if self.usd else ""
        return (
            f"{self.change} would fit: {self.device_gib:.1f} of {self.memory_gib:.1f} GiB, "
            f"about {takes}{price} of steps."
        )


def nearest_changes(
    architecture: Architecture, settings: Settings, stack: Stack, node: Node, limit: float, tokens: float
) -> list[Remedy]:
    """Up to three changes, the smallest first.

    Args:
        limit: GiB that one device has.
        tokens: useful tokens of the whole run.
    """
    offer = cheapest_offers().get((node.gpu.name, 1)) if not node.local else None
    price = offer.usd_per_h * settings.world_size if offer and offer.usd_per_h else None
    found: list[Remedy] = []
    shorter = False
    for change, changes in _ways(settings, node.gpu):
        if change.startswith("sequence_length") and shorter:
            continue
        remedy = _remedy(change, architecture, replace(settings, **changes), stack, node.gpu, limit, tokens)
        if remedy is None:
            continue
        shorter |= change.startswith("sequence_length")
        usd = price * remedy.hours if price else None
        found.append(replace(remedy, usd=usd, usd_per_h=price, provider=offer.provider if offer else ""))
        if len(found) == 3:
            return found
    return found + _larger_gpus(architecture, settings, stack, node, tokens)[: 3 - len(found)]


def _ways(settings: Settings, gpu: Gpu) -> Iterator[tuple[str, dict[str, Any]]]:
    """What could be changed, the smallest change to what is learned first."""
    small = {"micro_batch": 1, "accumulation": settings.accumulation * settings.micro_batch, "checkpointing": "full"}
    lean = {**small, "precision": "bf16" if gpu.bf16 else settings.precision}
    if settings.checkpointing in ("none", "selective"):
        yield "hardware.checkpointing: full", {"checkpointing": "full"}
    if settings.micro_batch > 1:
        yield "micro_batch: 1 with checkpointing", dict(small)
    for length in (4096, 2048, 1024, 512):
        if length < settings.sequence_length:
            yield f"sequence_length: {length}", {**small, "sequence_length": length}
    adapters = {**lean, "rank": settings.rank or 16}
    if settings.tuning == "full":
        if settings.optimizer == "adamw" and gpu.kind == "cuda":
            yield "optimizer.name: adamw-8bit in bf16", {**lean, "optimizer": "adamw-8bit"}
        yield "tuning: lora", {**adapters, "tuning": "lora", "quantization": "none"}
    if settings.tuning != "qlora":
        yield "tuning: qlora", {**adapters, "tuning": "qlora", "quantization": "nf4"}


def _remedy(
    change: str, architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, limit: float, tokens: float
) -> Remedy | None:
    memory = peak_memory(architecture, settings, stack, gpu)
    if memory.device_gib > limit:
        return None
    speed = step_speed(architecture, settings, stack, gpu)
    return Remedy(change, memory.device_gib, limit, tokens / speed.tokens_per_s / 3600)


def _larger_gpus(
    architecture: Architecture, settings: Settings, stack: Stack, node: Node, tokens: float
) -> list[Remedy]:
    """Larger single GPUs on which it fits, the cheapest run first."""
    accumulation = settings.accumulation * settings.micro_batch * settings.world_size
    alone = replace(settings, micro_batch=1, accumulation=accumulation, checkpointing="full", world_size=1)
    offers = cheapest_offers()
    fitting = []
    for gpu in load_catalog().values():
        if gpu.memory_gib <= node.gpu.memory_gib or (settings.precision.startswith("bf16") and not gpu.bf16):
            continue
        remedy = _remedy(f"hardware.gpu: {gpu.name}", architecture, alone, stack, gpu, gpu.memory_gib, tokens)
        offer = offers.get((gpu.name, 1))
        if remedy and offer and offer.usd_per_h:
            usd = offer.usd_per_h * remedy.hours
            remedy = replace(remedy, usd=usd, usd_per_h=offer.usd_per_h, provider=offer.provider)
        if remedy:
            fitting.append(remedy)
    return sorted(fitting, key=lambda remedy: (remedy.usd is None, remedy.usd or 0.0, remedy.hours))
