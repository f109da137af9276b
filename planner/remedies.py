"""Where a plan does not fit: the nearest changes that would make it fit."""

from __future__ import annotations

from dataclasses import replace

from .architecture import Architecture
from .cost import cheapest_offers
from .hardware import Node, load_catalog
from .memory import Settings, peak_memory
from .stacks import Stack


def nearest_changes(
    architecture: Architecture, settings: Settings, stack: Stack, node: Node, limit: float
) -> list[str]:
    """Up to three changes, smallest first, each of which makes the run fit in ``limit`` GiB."""

    def need(**changes: object) -> float:
        return peak_memory(architecture, replace(settings, **changes), stack, node.gpu).device_gib  # type: ignore[arg-type]

    small = {"micro_batch": 1, "accumulation": settings.accumulation * settings.micro_batch, "checkpointing": "full"}
    lean = {**small, "precision": "bf16" if node.gpu.bf16 else settings.precision}
    lora = {"tuning": "lora", "quantization": "none"}
    ways: list[tuple[str, dict[str, object]]] = []
    if settings.checkpointing == "none":
        ways.append(("hardware.checkpointing: full", {"checkpointing": "full"}))
    if settings.micro_batch > 1:
        ways.append(("micro_batch: 1 with checkpointing", dict(small)))
    for length in (4096, 2048, 1024, 512):
        if length < settings.sequence_length:
            ways.append((f"sequence_length: {length}", {**small, "sequence_length": length}))
    if settings.tuning == "full":
        if settings.optimizer == "adamw" and node.gpu.kind == "cuda":
            ways.append(("optimizer.name: adamw-8bit in bf16", {**lean, "optimizer": "adamw-8bit"}))
        ways.append(("tuning: lora", {**lean, **lora, "rank": settings.rank or 16}))
    if settings.tuning != "qlora":
        ways.append(("tuning: qlora", {**lean, "tuning": "qlora", "quantization": "nf4", "rank": settings.rank or 16}))
    found: list[str] = []
    for name, changes in ways:
        if any(name.startswith("sequence_length") and other.startswith("sequence_length") for other in found):
            continue
        gib = need(**changes)
        if gib <= limit:
            found.append(f"{name} would fit: {gib:.1f} of {limit:.1f} GiB.")
        if len(found) == 3:
            return found
    found += _larger_gpus(architecture, settings, stack, node, small)[: 3 - len(found)]
    return found or ["No single change makes it fit: use a smaller model."]


def _larger_gpus(
    architecture: Architecture, settings: Settings, stack: Stack, node: Node, small: dict[str, object]
) -> list[str]:
    """Larger GPUs on which it fits, the cheapest by the hour first."""
    offers = cheapest_offers()
    fitting = []
    for gpu in load_catalog().values():
        if gpu.memory_gib <= node.gpu.memory_gib or (settings.precision.startswith("bf16") and not gpu.bf16):
            continue
        gib = peak_memory(architecture, replace(settings, **small), stack, gpu).device_gib  # type: ignore[arg-type]
        if gib <= gpu.memory_gib:
            offer = offers.get((gpu.name, 1))
            fitting.append(((offer.usd_per_h if offer else None) or float("inf"), gpu.name, gib, gpu.memory_gib))
    return [
        f"hardware.gpu: {name} would fit: {gib:.1f} of {have:.1f} GiB"
        + (f", from {price:.2f} USD per hour." if price < float("inf") else ".")
        for price, name, gib, have in sorted(fitting)
    ]
