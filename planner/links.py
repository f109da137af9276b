"""Time that devices wait for each other, and for host memory, beside what they send while they compute."""

from __future__ import annotations

from .architecture import Architecture
from .fused import parked_bytes
from .hardware import Gpu
from .settings import Settings
from .sharding import sent_bytes
from .shares import head_parameters, root_parameters, sent_layer, shares_base, stored
from .stacks import Stack
from .storage import QUANTIZED_BYTES

#: Share of a link's nominal speed that ring all-reduce gets (235 of 300 GB/s on NVLink 3).
_LINK_SHARE = 0.78
#: The same over PCIe, between cards that reach each other's memory, and through the host's.
_PCIE_SHARE, _STAGED_SHARE = 0.6, 0.2
#: Devices of one machine, and GB/s of one network card: InfiniBand of a DGX A100 (200 Gb/s) and of later ones (400).
_NODE, _NETWORK_GB_S = 8, {"7": 12.5, "8": 25.0}
#: Share of the bus that one copy from or to pinned memory gets (55.3 of 63 GB/s on PCIe 5).
_COPY_SHARE = 0.87
#: Seconds in which the host launches one layer: 1B-sized layers of 2.0 ms took 3.9 ms where they had to wait for it.
_LAYER_S = 1.8e-3
#: Share of the ring's speed that ZeRO-3's gathers reach: weights are copied into and out of its buffers.
_LIVE_SHARE = 0.5
#: Share of compute that communication hides behind, and the share of itself that never hides: of the gathers and
#: reductions of every layer half, as they take bandwidth and units from what they hide behind (torchtitan's and
#: fms-fsdp's Llama 2 and 3 on 64 and 128 A100: 0.04 to 1 of them, the more they are against the arithmetic, 0.5 at the
#: middle); of DDP's buckets little.
_OVERLAP, _EXPOSED, _EXPOSED_ONCE = 0.7, 0.5, 0.1
#: Host memory bandwidth that a CPU Adam gets, in bytes per second.
_HOST_BYTES_S = 60e9


def communication_s(
    architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, compute_s: float, backward_s: float,
    idle_s: float = 0.0,
) -> float:  # fmt: skip
    """Seconds of one step that devices wait for each other, beside what they send while they compute.

    Args:
        compute_s: computing of one micro-batch.
        backward_s: of its backward.
        idle_s: for which the device waits for the host in it, and has nothing that what is sent could slow down.
    """
    world = settings.world_size
    if world < 2:
        return 0.0
    how, width = settings.sharing, settings.compute_bytes
    link = _link(gpu, world)
    if shares_base(settings, stack):
        return _base_s(architecture, settings, stack, link, compute_s, idle_s)
    if settings.tuning == "full":
        gradients = float(architecture.parameters * (width if how.weights else settings.weight_bytes))
    else:
        pairs = architecture.lora_parameters(settings.rank, settings.targets)
        gradients = float(pairs * settings.adapter_bytes(stack))
    weights = float(width * architecture.parameters)
    if settings.quantized:
        packed = architecture.linear_weights + (architecture.expert_weights if stack.quantizes_experts else 0)
        weights = QUANTIZED_BYTES[settings.quantization] * packed + width * (architecture.parameters - packed)
    each, once = sent_bytes(how, world, weights=weights, gradients=gradients)
    each /= _LIVE_SHARE if how.gathers == "live" else 1.0
    # Gathers run ahead of both passes, reductions behind backward; DDP's only behind the last micro-batch's.
    waits = max(_EXPOSED * each / link - idle_s, each / link - _OVERLAP * compute_s, 0.0) * settings.accumulation
    return waits + max(_EXPOSED_ONCE * once / link, once / link - _OVERLAP * backward_s)


def _base_s(
    architecture: Architecture, settings: Settings, stack: Stack, link: float, compute_s: float, idle_s: float
) -> float:
    """Seconds of one step that devices wait for a frozen base which they share, and for each other's adapters.

    The two layers that a pass ends with are those that the next one begins with, so they are not sent again. An
    embedding comes before anything could hide it, and adapters between two steps.
    """
    ring, layers = (settings.world_size - 1) / settings.world_size, architecture.num_layers
    fixed = stored(architecture, settings, stack)
    sent = sent_layer(architecture, settings, fixed) * ring / link
    table = root_parameters(architecture) - head_parameters(architecture)
    bare = settings.compute_bytes * table * ring / link
    each = 2.0 * max(layers - 2, 0) * sent
    waits = bare + max(_EXPOSED * each - idle_s, each - _OVERLAP * compute_s, 0.0)
    return waits * settings.accumulation + 2.0 * ring * fixed.adapter / link


def _link(gpu: Gpu, world: int) -> float:
    """Bytes per second that a ring of all devices moves through each.

    Between nodes all that a ring moves goes through the network cards of a node, one for each GPU.
    """
    if gpu.kind == "cpu":
        return 2e9
    if gpu.link_gb_s:
        inside = gpu.link_gb_s * 1e9 * _LINK_SHARE
        card = _NETWORK_GB_S.get(gpu.compute_capability[:1], 50.0) * 1e9 * _LINK_SHARE
        return inside if world <= _NODE else min(inside, _NODE * card)
    # Consumer cards can't reach each other's memory: each byte is written to host memory and read again.
    staged = gpu.name.startswith(("RTX-30", "RTX-40", "RTX-50")) and not gpu.name.endswith("-Ada")
    return gpu.pcie_gb_s * 1e9 * (_STAGED_SHARE if staged else _PCIE_SHARE)


def offload_s(architecture: Architecture, settings: Settings, gpu: Gpu) -> float:
    """Seconds of one step that host memory costs: weights over PCIe for each pass, and Adam on the host."""
    if settings.offload == "none":
        return 0.0
    trained = architecture.trainable(settings.tuning, settings.rank, settings.targets) / settings.world_size
    bus = gpu.pcie_gb_s * 1e9 * _PCIE_SHARE
    adam = trained * 28 / _HOST_BYTES_S + trained * 6 / bus  # states and masters there, gradients and weights across
    if settings.offload == "optimizer":
        return adam
    moved = 2.0 * settings.compute_bytes * architecture.parameters / settings.world_size / bus
    return adam + 0.5 * moved * settings.accumulation


def parking_s(architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, forward_s: float) -> float:
    """Seconds of one micro-batch that layers wait for what is parked on the host, out in forward and back in backward.

    Each layer waits until the set before the last one has left, and is launched only then.

    Args:
        forward_s: of one micro-batch; backward takes twice as long.
    """
    layers = architecture.num_layers
    copy = parked_bytes(architecture, settings, stack) / layers / (gpu.pcie_gb_s * 1e9 * _COPY_SHARE) + _LAYER_S
    one = forward_s / layers
    return layers * (max(0.0, copy - one) + max(0.0, copy - 2 * one))
