"""Checkpointing policies: which of them a run can use, and how many layers ``selective`` may leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .architecture import Architecture
from .errors import HardwareError
from .fused import parked_bytes, stack_on
from .hardware import GIB, Gpu, Node
from .memory import peak_memory
from .plan import Checkpointing
from .settings import Settings
from .stacks import Stack

#: Share of the host's memory that parked tensors may take: the system, the data and the page cache want the rest.
_HOST_SHARE = 0.5


def can_park(architecture: Architecture, settings: Settings, stack: Stack, node: Node) -> str:
    """Why what layers keep can't wait in host memory; empty if it can."""
    if node.gpu.kind == "cpu":
        return "a CPU's memory is the host's"
    offloading = replace(settings, checkpointing="offload")
    if not stack_on(architecture, offloading, stack, node.gpu).whole_layers and not stack.offloads_checkpoints:
        return "only whole-layer kernels park what they keep, and these layers run without them"
    need = parked_bytes(architecture, offloading, stack) * settings.world_size / GIB
    # Rented hosts whose memory nobody names have at least as much as their GPUs.
    have = _HOST_SHARE * (node.host_memory_gib or 2 * node.gpu.memory_gib * max(node.count, 1))
    return f"it would take {need:.0f} GiB of host memory, of which {have:.0f} may be used" if need > have else ""


def ways_to_checkpoint(
    architecture: Architecture, settings: Settings, stack: Stack, node: Node, limit: float,
    asked: Checkpointing | None = None, kept: int | None = None,
) -> Iterator[Settings]:  # fmt: skip
    """The settings under each policy that can be used, or under the one ``asked`` for.

    Args:
        limit: GiB that one device has.
        kept: layers that ``selective`` leaves alone; None is as many as fit.

    Raises:
        HardwareError: ``offload`` was asked for where nothing can be parked.
    """
    for policy in (asked,) if asked else ("none", "selective", "offload", "full"):
        if policy == "selective":
            if kept is not None:
                yield replace(settings, checkpointing=policy, kept_layers=min(kept, architecture.num_layers))
                continue
            chosen = most_layers(architecture, settings, stack, node.gpu, limit)
            if chosen.kept_layers or asked:
                yield chosen
        elif policy == "offload":
            why = can_park(architecture, settings, stack, node)
            if why and asked:
                do = "Use checkpointing: full, or auto."
                raise HardwareError(f"nothing can be offloaded: {why}", where="hardware.checkpointing", do=do)
            if not why:
                yield replace(settings, checkpointing=policy)
        else:
            yield replace(settings, checkpointing=policy)


def most_layers(architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, limit: float) -> Settings:
    """``selective`` with the most layers kept whose memory fits with its margin; 0 where not even one does.

    Memory grows nearly evenly with each layer, so a line between the ends lands within a step or two of the answer.
    """
    layers = architecture.num_layers

    def need(policy: Checkpointing, kept: int = 0) -> float:
        keeping = replace(settings, checkpointing=policy, kept_layers=kept)
        return peak_memory(architecture, keeping, stack, gpu).high_gib

    low, high = 0, layers  # the ends are policies of their own, which are asked for anyway
    least, most = need("full"), need("none")
    if most <= limit:
        low = layers - 1
    elif least > limit:
        high = 1
    while high - low > 1:
        guess = low + round((high - low) * (limit - least) / (most - least))
        guess = min(max(guess, low + 1), high - 1)
        size = need("selective", guess)
        if size <= limit:
            low, least = guess, size
        else:
            high, most = guess, size
    return replace(settings, checkpointing="selective", kept_layers=low)
