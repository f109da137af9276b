"""How several devices share weights, gradients and optimiser states, and what they send each other for it.

    ddp      every device holds everything; gradients are all-reduced through buckets that hold them once more
    zero1    optimiser states split (DeepSpeed, arXiv:1910.02054)
    zero2    and gradients; SHARD_GRAD_OP of FSDP is the same with weights gathered once per step
    zero3    and weights: those of the next layers are gathered as long as ``stage3_max_live_parameters`` allows
    fsdp     the same, layer by layer: one at work and one on its way (arXiv:2304.11277); embedding and head form the
             root unit, which stays gathered from forward to the end of backward. Beside adapters, ours splits a frozen
             base alone (:attr:`.stacks.Stack.shares_base`)

DeepSpeed keeps 16-bit weights beside fp32 masters; FSDP gathers 16-bit copies of the shards, whatever these are in.
Activations and logits are not shared: each device has its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Elements that ZeRO-3 keeps gathered (``stage3_max_live_parameters``), steps at once (``sub_group_size``), and that
#: ZeRO-2 reduces and gathers per bucket (``reduce_bucket_size``, ``allgather_bucket_size``): DeepSpeed's defaults.
LIVE_ELEMENTS = 1e9
SUB_GROUP_ELEMENTS = 1e9
BUCKET_ELEMENTS = 5e8


@dataclass(frozen=True)
class Strategy:
    """What is split over the devices, and how it comes together for a layer's work."""

    name: str
    title: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    masters: bool = False
    """16-bit weights with fp32 masters among the optimiser states."""
    buckets: bool = False
    """Gradients are held once more while they are reduced."""
    gathers: str = ""
    """``layers``: whole layers, one ahead; ``live``: up to LIVE_ELEMENTS."""
    lowers: bool = False
    """Layers are handed 16-bit weights whatever is stored, so what passes between them is in 16 bits, where autocast
    over fp32 weights leaves it in fp32."""

    def share(self, what: str, world: int) -> float:
        """The part of ``weights``, ``gradients`` or ``optimizer`` that one of ``world`` devices holds."""
        return 1.0 / world if getattr(self, what) else 1.0


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("single", "one device"),
        Strategy("ddp", "DDP", buckets=True),
        Strategy("zero1", "ZeRO-1", optimizer=True, masters=True, buckets=True, lowers=True),
        Strategy("zero2", "ZeRO-2", gradients=True, optimizer=True, masters=True, lowers=True),
        Strategy("zero3", "ZeRO-3", True, True, True, masters=True, gathers="live", lowers=True),
        Strategy("shard-grad-op", "FSDP SHARD_GRAD_OP", gradients=True, optimizer=True, lowers=True),
        Strategy("fsdp", "FSDP2", True, True, True, gathers="layers", lowers=True),
    )
}


@dataclass(frozen=True)
class Gathered:
    """Bytes that are whole on a device for a while, at the loss and at the backward of one layer."""

    loss: float = 0.0
    backward: float = 0.0
    gradients: float = 0.0
    """Gradients of the root unit and of the layer at work, before they are reduced and split."""
    stranded: float = 0.0
    """What the allocator keeps of it: gathers run on a stream of their own, whose freed blocks no other may take."""


def gathered(
    strategy: Strategy, *, root: float, layer: float, compute: int, layer_bytes: float, trained_root: float,
    trained_layer: float, width: int,
) -> Gathered:  # fmt: skip
    """What a strategy gathers.

    Args:
        root, layer: parameters of the root unit (embedding, head) and of the largest layer.
        compute: bytes per parameter as computed with.
        layer_bytes: a layer as it is sent: its quantised bytes where it is quantised.
        trained_root, trained_layer: parameters among them that get gradients.
        width: bytes per gradient.
    """
    if strategy.gathers == "layers":
        # A layer's gradients, and the flat buffer that reduce-scatter sends.
        grads = width * trained_root + 2 * width * trained_layer
        backward = compute * root + 2 * layer_bytes
        return Gathered(compute * root + layer_bytes, backward, grads, backward)
    if strategy.gathers == "live":
        # Parameters of every size come and go, so what one gather leaves rarely serves the next; embedding and head,
        # gathered at the two ends of a pass, leave the largest gaps.
        live = max(compute * LIVE_ELEMENTS, compute * root / 2, 2 * layer_bytes)
        return Gathered(live, live, 2 * width * trained_layer, live + compute * root)
    if strategy.gradients and strategy.masters and not trained_layer:
        # DeepSpeed allocates its bucket whole as backward begins, however little there is to reduce (``ipg_buffer``).
        return Gathered(compute * BUCKET_ELEMENTS, compute * BUCKET_ELEMENTS)
    if strategy.gradients:
        buckets = 2 * compute * min(BUCKET_ELEMENTS, trained_root + trained_layer * 64)
        return Gathered(0.0, buckets, width * trained_layer, buckets)
    return Gathered()


def sent_bytes(strategy: Strategy, world: int, *, weights: float, gradients: float) -> tuple[float, float]:
    """Bytes that one device sends per micro-batch, and once per optimiser step.

    Args:
        weights: bytes of the whole model as it is gathered.
        gradients: bytes of all gradients.
    """
    ring = (world - 1) / world
    if world < 2:
        return 0.0, 0.0
    if strategy.weights:  # gathered for forward and for backward, and gradients reduced and split
        return ring * (2 * weights + gradients), 0.0
    if strategy.gradients:
        return ring * gradients, ring * gradients  # and the updated weights gathered
    return 0.0, 2 * ring * gradients
