"""One device's share of what is stored, and what it holds whole for a while, by strategy and offloading."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .architecture import Architecture
from .methods import METHODS
from .settings import Settings
from .sharding import SUB_GROUP_ELEMENTS, Gathered, gathered
from .stacks import Stack
from .storage import Fixed, fixed_bytes
from .trained import saved_parameters, shared_bytes, trained_parameters


@dataclass(frozen=True)
class Shares:
    """Bytes on one device."""

    weights: float
    adapter: float
    optimizer: float
    gradients: float
    temporary: float
    copies: float
    bucket: float
    held: float
    """Gradients of earlier micro-batches."""
    whole: Gathered
    buffers: float = 0.0
    """Two layers of a frozen base that is split."""
    head: float = 0.0
    """What of the weights is there beyond this device's part: the head beside a frozen base that is split."""

    @property
    def static(self) -> float:
        return self.weights + self.adapter + self.optimizer


def stored(architecture: Architecture, settings: Settings, stack: Stack) -> Fixed:
    """What the model stores before it is shared."""
    return fixed_bytes(
        architecture, settings.tuning, settings.rank, settings.targets, settings.quantization, settings.weight_bytes,
        settings.compute_bytes, settings.adapter_bytes(stack), settings.optimizer, stack,
        METHODS[settings.method].scalar_head, trained_parameters(architecture, settings),
        shared_bytes(architecture, settings), settings.updates, saved_parameters(architecture, settings),
    )  # fmt: skip


def shares(architecture: Architecture, settings: Settings, stack: Stack, fixed: Fixed) -> Shares:
    """What one device holds of it."""
    how, world = settings.sharing, settings.world_size
    full, width = settings.tuning == "full", settings.weight_bytes
    split_weights, split_states = how.share("weights", world), how.share("optimizer", world)
    optimizer = fixed.optimizer * split_states
    temporary = fixed.optimizer_temporary * split_states
    if how.masters:  # fp32 masters and, sub-group by sub-group, fp32 gradients for the step
        optimizer += (8.0 * fixed.trained - fixed.optimizer) * split_states if settings.optimizer == "adamw" else 0.0
        optimizer += 4.0 * fixed.trained * split_states
        # ZeRO-3 steps sub-group by sub-group; 1 and 2 make one flat tensor of all 16-bit gradients, and then fp32 ones.
        part = fixed.trained * split_states
        whole_step = min(part, SUB_GROUP_ELEMENTS) if how.weights else part
        temporary = (4.0 if stack.fused_optimizer or settings.optimizer != "adamw" else 8.0) * whole_step
        temporary += 0.0 if how.weights else 2.0 * part
    gradients = fixed.gradients
    if settings.optimizer_in_backward:
        gradients = min(gradients, max(fixed.head_gradient, fixed.layer_gradient))
    if stack.flat_gradients and how.gathers == "layers" and not full:
        gradients = settings.compute_bytes * (architecture.parameters - root_parameters(architecture))
    whole, buffers = Gathered(), 0.0
    if based := shares_base(settings, stack):
        buffers = 2.0 * sent_layer(architecture, settings, fixed)
    elif how.gradients:
        root, layer = root_parameters(architecture), max(layer.parameters for layer in architecture.layers)
        sent = sent_layer(architecture, settings, fixed)
        flat = stack.flat_gradients and not full
        whole = gathered(
            how, root=root, layer=layer, compute=settings.compute_bytes, layer_bytes=sent,
            trained_root=root if full else 0.0, trained_layer=layer if full or flat else 0.0,
            width=width if full else settings.compute_bytes,
        )  # fmt: skip
    split = how.share("gradients", world)
    if based or (stack.accumulates_whole and settings.accumulation > 1):
        split = 1.0
    weights, beside = fixed.weights, width * head_parameters(architecture) if based else 0.0
    if settings.beside.copy:
        weights += settings.compute_bytes * architecture.parameters
    if settings.beside.teacher is not None:
        weights += settings.beside.teacher.stored_bytes(settings.compute_bytes, stack)
    shared = Shares(
        # FSDP does not split what is hidden behind a parametrisation.
        weights=(weights - fixed.packed_experts) * split_weights
        + beside * (1.0 - split_weights)
        + fixed.packed_experts * (1.0 if how.gathers == "layers" and not based else split_weights),
        adapter=fixed.adapter * (1.0 + split_weights if based else split_weights),
        optimizer=optimizer,
        gradients=gradients * split,
        temporary=temporary,
        # Gathered layers are 16-bit copies already.
        copies=0.0 if how.gathers or how.masters else fixed.weight_copies,
        bucket=fixed.gradients if how.buckets else 0.0,
        held=gradients * split if settings.accumulation > 1 or settings.graphs else 0.0,
        whole=whole,
        buffers=buffers,
        head=beside * (1.0 - split_weights),
    )
    if settings.offload == "none":
        return shared
    shared = replace(shared, optimizer=0.0, temporary=0.0)
    return shared if settings.offload == "optimizer" else replace(shared, weights=0.0, adapter=0.0, gradients=0.0)


def shares_base(settings: Settings, stack: Stack) -> bool:
    """Whether a frozen base alone is split, as finetui does it (:attr:`.stacks.Stack.shares_base`)."""
    split = settings.sharing.gathers == "layers" and settings.world_size > 1
    return stack.shares_base and split and settings.tuning != "full"


def sent_layer(architecture: Architecture, settings: Settings, fixed: Fixed) -> float:
    """Bytes of the largest layer as it is gathered."""
    if settings.quantized:
        return fixed.layer_bytes
    return settings.compute_bytes * max(layer.parameters for layer in architecture.layers)


def head_parameters(architecture: Architecture) -> float:
    """Parameters outside the layers and an embedding that is a table alone."""
    table = 0 if architecture.tied else architecture.vocab * architecture.hidden
    return root_parameters(architecture) - table


def root_parameters(architecture: Architecture) -> float:
    """Parameters outside the layers: FSDP's root unit."""
    return float(architecture.embedding_parameters + architecture.head_parameters + architecture.final_norm)
