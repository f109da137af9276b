"""Where a plan does not fit: the nearest changes that would make it fit, each with what it costs in time or money."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .architecture import Architecture
from .cost import cheapest_offers, duration
from .hardware import Gpu, Node, load_catalog
from .memory import peak_memory
from .options import PAGED, TuningOptions
from .settings import Settings
from .speed import step_speed
from .stacks import Stack
from .strategies import SPLITTABLE

if TYPE_CHECKING:
    from .recipe import Recipe


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
        price = f" and {self.usd:.2f} USD ({self.provider}, {self.usd_per_h:.2f} an hour)" if self.usd else ""
        return (
            f"{self.change} would fit: {self.device_gib:.1f} of {self.memory_gib:.1f} GiB, "
            f"about {duration(3600 * self.hours)}{price} of steps."
        )


def nearest_changes(
    architecture: Architecture, settings: Settings, stack: Stack, node: Node, limit: float, tokens: float,
    said: frozenset[str] = frozenset(), aside: Callable[[Gpu], float] = lambda gpu: 0.0, *, splits: bool = False,
) -> list[Remedy]:  # fmt: skip
    """Up to three changes, the smallest first.

    Args:
        limit: GiB that one device has.
        tokens: useful tokens of the whole run.
        said: fields of the settings that the recipe sets, so that a change of them has to be told; all others follow
            by themselves.
        aside: GiB of a GPU that are not for training.
        splits: finetui's engine can split the model over several GPUs.
    """
    offer = cheapest_offers().get((node.gpu.name, 1)) if not node.local else None
    price = offer.usd_per_h * settings.world_size if offer and offer.usd_per_h else None
    found: list[Remedy] = []
    if aside(node.gpu):
        change = "rollout.engine: transformers"
        remedy = _remedy(change, architecture, settings, stack, node.gpu, node.gpu.memory_gib, tokens)
        found += [remedy] if remedy else []
    shorter = False
    for change, changes in _ways(settings, node.gpu, splits=splits):
        if change.startswith("sequence_length") and shorter:
            continue
        told = _told(change, changes, settings, said)
        remedy = _remedy(told, architecture, replace(settings, **changes), stack, node.gpu, limit, tokens)
        if remedy is None:
            continue
        shorter |= change.startswith("sequence_length")
        usd = price * remedy.hours if price else None
        found.append(replace(remedy, usd=usd, usd_per_h=price, provider=offer.provider if offer else ""))
        if len(found) == 3:
            return found
    if splits and not node.local:
        more = _more_gpus(architecture, settings, stack, node.gpu, limit, tokens, said)
        found += [more] if more else []
    return found + _larger_gpus(architecture, settings, stack, node, tokens, said, aside)[: 3 - len(found)]


#: Fields of the settings by the keys of a recipe that set them.
_KEYS = {
    "checkpointing": "hardware.checkpointing", "micro_batch": "micro_batch", "precision": "hardware.precision",
    "optimizer": "optimizer.name", "world_size": "hardware.gpus", "strategy": "hardware.strategy",
}  # fmt: skip


def said_in(recipe: Recipe) -> frozenset[str]:
    """The fields that a recipe sets and that a way out may change."""
    hardware = recipe.hardware
    fields = {
        "checkpointing": hardware.checkpointing, "micro_batch": recipe.micro_batch, "precision": hardware.precision,
        "optimizer": recipe.optimizer.name, "world_size": hardware.gpus, "strategy": hardware.strategy,
    }  # fmt: skip
    return frozenset(name for name, value in fields.items() if value != "auto")


def _told(change: str, changes: dict[str, Any], settings: Settings, said: frozenset[str]) -> str:
    """A change with those beside it that the recipe has to make too."""
    more = [
        f"{key}: {changes[name]}"
        for name, key in _KEYS.items()
        if name in said and changes.get(name, getattr(settings, name)) != getattr(settings, name) and key not in change
    ]
    return change if not more else f"{change} with {' and '.join(more)}"


def _fewest(settings: Settings) -> int:
    """The smallest micro-batch that the method can learn from: kto measures KL on another row's answer."""
    return min(settings.micro_batch, 2 if settings.method == "kto" else 1)


def _ways(settings: Settings, gpu: Gpu, *, splits: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What could be changed, the smallest change to what is learned first."""
    fewest = _fewest(settings)
    again = settings.accumulation * settings.micro_batch // fewest
    small: dict[str, Any] = {"micro_batch": fewest, "accumulation": again, "checkpointing": "full"}
    lean = {**small, "precision": "bf16" if gpu.bf16 else settings.precision}
    plain = settings.optimizer in SPLITTABLE
    if splits and settings.world_size > 1 and settings.strategy == "ddp":
        yield "hardware.strategy: fsdp", {**small, "strategy": "fsdp", **({} if plain else {"optimizer": "adamw"})}
    if settings.checkpointing in ("none", "selective"):
        yield "hardware.checkpointing: full", {"checkpointing": "full"}
    if settings.micro_batch > fewest:
        yield f"micro_batch: {fewest}", dict(small)
    teacher = settings.beside.teacher
    if teacher is not None and teacher.quantization == "none" and teacher.architecture.packed is None:
        packed = replace(settings.beside, teacher=replace(teacher, quantization="nf4"))
        yield "distillation.quantization: nf4", {**small, "passes": packed}
    for length in (4096, 2048, 1024, 512):
        if length < settings.sequence_length:
            yield f"sequence_length: {length}", {**small, "sequence_length": length}
    held = settings.passes and replace(settings.passes, copy=False)  # a frozen base is its own reference
    adapters = {
        **lean, "rank": settings.rank or 16, "kind": "", "dora": False, "trained": 0, "options": TuningOptions(),
        "passes": held,
    }  # fmt: skip
    if settings.tuning == "full":
        if settings.optimizer == "adamw" and gpu.kind == "cuda":
            yield "optimizer.name: adamw-8bit", {**lean, "optimizer": "adamw-8bit"}
        yield "tuning: lora", {**adapters, "tuning": "lora", "quantization": "none"}
    if settings.tuning != "qlora":
        strategy = "fsdp" if splits and settings.strategy == "fsdp" else "ddp"
        yield "tuning: qlora", {**adapters, "tuning": "qlora", "quantization": "nf4", "strategy": strategy}


def _remedy(
    change: str, architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, limit: float, tokens: float,
    *, safely: bool = False,
) -> Remedy | None:  # fmt: skip
    """``safely``: it has to fit at the high end of its interval, as what is rented for it should."""
    memory = peak_memory(architecture, settings, stack, gpu)
    if (memory.high_gib if safely else memory.device_gib) > limit:
        return None
    speed = step_speed(architecture, settings, stack, gpu)
    return Remedy(change, memory.device_gib, limit, tokens / speed.tokens_per_s / 3600)


def _more_gpus(
    architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, limit: float, tokens: float,
    said: frozenset[str],
) -> Remedy | None:  # fmt: skip
    """The fewest GPUs of the same kind over which it can be split."""
    offers, fewest = cheapest_offers(), _fewest(settings)
    plain: dict[str, Any] = {} if settings.optimizer in SPLITTABLE - PAGED else {"optimizer": "adamw"}
    rows = settings.accumulation * settings.micro_batch * settings.world_size
    for world in (2, 4, 8):
        if world <= settings.world_size or rows % (fewest * world):
            continue
        changes = {"micro_batch": fewest, "checkpointing": "full", "world_size": world, "strategy": "fsdp", **plain}
        change = _told(f"hardware.gpus: {world}", changes, settings, said - {"world_size"})
        split = replace(settings, accumulation=rows // (fewest * world), **changes)
        remedy = _remedy(change, architecture, split, stack, gpu, limit, tokens, safely=True)
        if remedy is None:
            continue
        offer = offers.get((gpu.name, world)) or offers.get((gpu.name, 1))
        if offer is None or not offer.usd_per_h:
            return remedy
        price = offer.usd_per_h * world / offer.count
        return replace(remedy, usd=price * remedy.hours, usd_per_h=price, provider=offer.provider)
    return None


def _larger_gpus(
    architecture: Architecture, settings: Settings, stack: Stack, node: Node, tokens: float, said: frozenset[str],
    aside: Callable[[Gpu], float],
) -> list[Remedy]:  # fmt: skip
    """Larger single GPUs on which it fits, the cheapest run first; of another maker's or a laptop's none is advised."""
    fewest = _fewest(settings)
    accumulation = settings.accumulation * settings.micro_batch * settings.world_size // fewest
    changes: dict[str, Any] = {"micro_batch": fewest, "checkpointing": "full", "world_size": 1, "strategy": "single"}
    if node.gpu.kind == "cpu" and "precision" not in said:  # which computes in fp32
        changes["precision"] = "bf16" if settings.tuning != "full" else "bf16-mixed"
    alone = replace(settings, accumulation=accumulation, **changes)
    offers = cheapest_offers()
    fitting = []
    for gpu in load_catalog().values():
        if not gpu.compute_capability[:1].isdigit() or gpu.name.endswith("-Laptop"):
            continue
        if alone.precision.startswith("bf16") and not gpu.bf16:
            continue
        if gpu.memory_gib <= node.gpu.memory_gib and node.gpu.kind != "cpu":
            continue
        change = _told(f"hardware.gpu: {gpu.name}", changes, settings, said)
        room = gpu.memory_gib - aside(gpu)
        remedy = _remedy(change, architecture, alone, stack, gpu, room, tokens, safely=True)
        offer = offers.get((gpu.name, 1))
        if remedy and offer and offer.usd_per_h:
            usd = offer.usd_per_h * remedy.hours
            remedy = replace(remedy, usd=usd, usd_per_h=offer.usd_per_h, provider=offer.provider)
        if remedy:
            fitting.append(remedy)
    return sorted(fitting, key=lambda remedy: (remedy.usd is None, remedy.usd or 0.0, remedy.hours))
