"""Peak memory of one device, term by term, as the largest of three moments of a steady step.

    loss       all that forward kept, and the loss's own buffers
    backward   one layer at work, with what is still kept, and the gradients so far
    optimizer  all gradients, and the optimiser's temporaries

Adding the terms of all three, as most estimates do, counts memory that never lives at the same time: checkpoints are
freed layer by layer while gradients appear. What forward keeps is in :mod:`.activations`, what is there whatever the
batch in :mod:`.storage`, and how several devices share it in :mod:`.sharding`. All results are bytes unless named
``gib``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from .activations import activation_bytes
from .architecture import Architecture
from .fused import layer_bytes, runs_whole_layers
from .hardware import GIB, Gpu
from .interval import margins
from .methods import METHODS, stack_for
from .plan import Memory
from .sharding import STRATEGIES, SUB_GROUP_ELEMENTS, Gathered, Strategy, gathered
from .stacks import Stack
from .storage import Fixed, fixed_bytes

Moment = Literal["loss", "backward", "optimizer", "rollout"]

#: Bytes per logit of a tile in forward and backward where torch operations fold it instead of a Triton kernel: their
#: fp32 temporaries (measured with TRL 1.16 on the CPU).
_CPU_TILE = (29.0, 45.0)


@dataclass(frozen=True)
class Settings:
    """What of a plan decides over memory and speed. Widths, dtypes and names as in :class:`.plan.Resolved`."""

    tuning: Literal["full", "lora", "qlora"]
    sequence_length: int
    micro_batch: int = 1
    accumulation: int = 1
    rank: int = 16
    dropout: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    dora: bool = False
    """Weights split into magnitude and direction (arXiv:2402.09353)."""
    quantization: Literal["none", "nf4", "nf4-single", "int8", "gptq"] = "none"
    precision: Literal["bf16", "bf16-mixed", "fp16", "fp32"] = "bf16"
    optimizer: str = "adamw"
    checkpointing: Literal["none", "full"] = "full"
    attention: Literal["sdpa", "eager"] = "sdpa"
    world_size: int = 1
    strategy: str = "ddp"
    """A name in :data:`.sharding.STRATEGIES`; without effect on one device."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What waits in host memory: the optimiser's states and masters, or the weights and gradients too."""
    kernels: bool = True
    """Whether finetui's own kernels may run; other stacks have none."""
    method: str = "sft"
    """A name in :data:`.methods.METHODS`."""
    optimizer_in_backward: bool = False
    """Each gradient is applied and freed as soon as it is there."""
    offload_activations: bool = False
    masked: bool = False
    """Whether attention gets an explicit mask, as it does for padded and for packed rows under SDPA."""

    @property
    def rows(self) -> int:
        """Sequences of one micro-batch on one device: both halves of a pair count."""
        return self.micro_batch * METHODS[self.method].sequences

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one device."""
        return self.rows * self.sequence_length

    @property
    def weight_bytes(self) -> int:
        """Bytes per stored weight: mixed precision trains fp32 masters, a frozen base is stored as it computes."""
        if self.precision != "fp32" and self.sharing.masters:
            return 2  # the masters are among the optimiser's states
        if self.precision == "bf16" or (self.precision == "fp16" and self.tuning != "full"):
            return 2
        return 4

    @property
    def sharing(self) -> Strategy:
        return STRATEGIES[self.strategy if self.world_size > 1 else "single"]

    @property
    def quantized(self) -> bool:
        return self.quantization != "none"

    @property
    def compute_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def adapter_bytes(self, stack: Stack) -> int:
        if self.precision in ("fp32", "fp16"):  # the gradient scaler of fp16 needs fp32 parameters
            return 4
        return stack.adapter_bytes_4bit if self.quantized else stack.adapter_bytes


def peak_memory(
    architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, *, unknown: tuple[str, ...] = ()
) -> Memory:
    """Predict the peak of one device of ``gpu``.

    Args:
        unknown: what is not known about the run, names in :data:`.interval.UNKNOWN`; each widens the interval.
    """
    stack = stack_for(settings.method, stack_on(architecture, settings, stack, gpu))
    fixed = _fixed(architecture, settings, stack)
    shared = _share(architecture, settings, stack, fixed)
    moments = _moments(architecture, settings, stack, fixed, shared, cpu=gpu.kind == "cpu")
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    terms = moments[moment]
    static = shared.static
    allocated = static + sum(terms.values())
    # Gathers run on a stream of their own, whose freed blocks no other stream may take.
    slack = _slack(moments, stack, gpu) + shared.whole.backward
    context = context_bytes(gpu, settings.world_size)
    device = allocated + slack + context
    parts = {
        "weights": shared.weights,
        "adapter": shared.adapter,
        "gradients": terms["gradients"],
        "optimizer": shared.optimizer + terms["temporary"],
        "activations": terms["activations"],
        "logits": terms["logits"],
        "buffers": terms["buffers"] + slack,
        "context": context,
    }
    if not architecture.exact:
        unknown += ("shapes",)
    if settings.quantized and stack.quantizes_experts and architecture.expert_weights:
        unknown += ("experts",)
    if settings.quantized and stack.keeps_packed_inputs:
        unknown += ("packed",)
    if stack.whole_layers:
        unknown += ("kernels",)
    if settings.sharing.gathers:
        unknown += ("sharding",)
    if not stack.certain:
        unknown += ("stack",)
    off = margins(
        stored=static, moving=allocated - static, slack=slack, context=context, unknown=tuple(sorted(set(unknown)))
    )
    return Memory(
        allocated_gib=allocated / GIB,
        reserved_gib=(allocated + slack) / GIB,
        device_gib=device / GIB,
        low_gib=max(device - off["device"], 0.0) / GIB,
        high_gib=(device + off["device"]) / GIB,
        margins={name: size / GIB for name, size in off.items()},
        terms={name: size / GIB for name, size in parts.items()},
        moment=moment,
        lever=_lever(moment, parts, settings),
    )


def stack_on(architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu) -> Stack:
    """The stack as it runs here: its whole-layer functions only where they apply."""
    applies = settings.kernels and runs_whole_layers(
        architecture, stack, gpu, tuning=settings.tuning, dropout=settings.dropout
    )
    return stack if applies or not stack.whole_layers else _without_layers(stack)


@lru_cache(maxsize=16)
def _without_layers(stack: Stack) -> Stack:
    return replace(stack, whole_layers=False)


def _moments(
    architecture: Architecture, settings: Settings, stack: Stack, fixed: Fixed, shared: _Shared, *, cpu: bool = False
) -> dict[Moment, dict[str, float]]:
    """Bytes beside the static ones at each moment: three, and the rollout of methods that generate."""
    tokens, hidden, layers = settings.tokens, architecture.hidden, max(architecture.num_layers, 1)
    kept, transient = _activations(architecture, settings, stack)
    # Last hidden states, their norm's input in fp32 and the normalised copy, the embedding's output.
    tail = (10 if settings.compute_bytes == 2 else 16) * hidden * tokens
    forward, backward, head = _loss(architecture, settings, stack, fixed, cpu)
    copies, whole = shared.copies, shared.whole
    dequantized = fixed.dequantized
    if stack.whole_layers and settings.quantized:  # one layer's weights at a time, in a buffer that all layers share
        dequantized = 2.0 * max(layer.linear_weights for layer in architecture.layers)
    loss = {
        "activations": kept + tail,
        "gradients": shared.held,
        "logits": max(forward, backward + head),
        "buffers": copies + _mask(settings) + shared.bucket + whole.loss,
        "temporary": 0.0,
    }
    # The last layer's backward: everything is still kept. The first layer's: all gradients are there.
    first = kept + (0.0 if whole.gradients else fixed.head_gradient) + shared.held + whole.gradients
    last = max(shared.gradients, shared.held) + whole.gradients
    if settings.tuning == "full" and settings.accumulation > 1 and not whole.gradients:
        first += fixed.layer_gradient
        last += fixed.layer_gradient
    full_now = first >= last
    buffers = dequantized + fixed.experts_merged + _mask(settings) + shared.bucket + whole.backward
    layer = {
        "activations": (kept if full_now else kept / layers) + transient,
        "gradients": first - kept if full_now else last,
        "logits": 0.0,
        "buffers": buffers + (copies if settings.checkpointing == "none" else copies / layers),
        "temporary": 0.0,
    }
    step = {
        "activations": 0.0,
        "gradients": shared.gradients,
        "logits": 0.0,
        "buffers": shared.bucket,
        "temporary": shared.temporary,
    }
    moments: dict[Moment, dict[str, float]] = {"loss": loss, "backward": layer, "optimizer": step}
    if METHODS[settings.method].rollouts:
        cache = kv_cache_bytes(architecture, settings)
        held = {"activations": 6.0 * hidden * settings.rows * settings.accumulation, "gradients": 0.0, "logits": 0.0}
        moments["rollout"] = {**held, "buffers": cache + copies + whole.loss, "temporary": 0.0}
    return moments


def kv_cache_bytes(architecture: Architecture, settings: Settings) -> float:
    """Keys and values of all answers that one optimiser step learns from: they are generated at once.

    TRL generates ``steps_per_generation`` micro-batches together, which is the accumulation unless set.
    """
    per_token = 2.0 * architecture.kv_width * architecture.num_layers * 2
    return per_token * settings.sequence_length * settings.rows * settings.accumulation


def _fixed(architecture: Architecture, settings: Settings, stack: Stack) -> Fixed:
    return fixed_bytes(
        architecture, settings.tuning, settings.rank, settings.targets, settings.quantization, settings.weight_bytes,
        settings.compute_bytes, settings.adapter_bytes(stack), settings.optimizer, stack,
        METHODS[settings.method].scalar_head,
    )  # fmt: skip


@dataclass(frozen=True)
class _Shared:
    """One device's part of what is stored, and what it holds whole for a while."""

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

    @property
    def static(self) -> float:
        return self.weights + self.adapter + self.optimizer


def _share(architecture: Architecture, settings: Settings, stack: Stack, fixed: Fixed) -> _Shared:
    how, world = settings.sharing, settings.world_size
    full, width = settings.tuning == "full", settings.weight_bytes
    split_weights, split_states = how.share("weights", world), how.share("optimizer", world)
    optimizer = fixed.optimizer * split_states
    temporary = fixed.optimizer_temporary * split_states
    if how.masters:  # fp32 masters and, sub-group by sub-group, fp32 gradients for the step
        optimizer += (8.0 * fixed.trained - fixed.optimizer) * split_states if settings.optimizer == "adamw" else 0.0
        optimizer += 4.0 * fixed.trained * split_states
        temporary += 4.0 * min(fixed.trained * split_states, SUB_GROUP_ELEMENTS)
    gradients = fixed.gradients
    if settings.optimizer_in_backward:
        gradients = min(gradients, max(fixed.head_gradient, fixed.layer_gradient))
    if stack.flat_gradients and how.gathers == "layers" and not full:
        gradients = settings.compute_bytes * (architecture.parameters - _root(architecture))
    whole = Gathered()
    if how.gradients:
        root, layer = _root(architecture), max(layer.parameters for layer in architecture.layers)
        sent = fixed.layer_bytes if settings.quantized else settings.compute_bytes * layer
        flat = stack.flat_gradients and not full
        whole = gathered(
            how, root=root, layer=layer, compute=settings.compute_bytes, layer_bytes=sent,
            trained_root=root if full else 0.0, trained_layer=layer if full or flat else 0.0,
            width=width if full else settings.compute_bytes,
        )  # fmt: skip
    split = 1.0 if stack.accumulates_whole and settings.accumulation > 1 else how.share("gradients", world)
    weights = fixed.weights
    if METHODS[settings.method].reference and full:
        weights += settings.compute_bytes * architecture.parameters
    shared = _Shared(
        weights=weights * split_weights,
        adapter=fixed.adapter * split_weights,
        optimizer=optimizer,
        gradients=gradients * split,
        temporary=temporary,
        # Gathered layers are 16-bit copies already.
        copies=0.0 if how.gathers or how.masters else fixed.weight_copies,
        bucket=fixed.gradients if how.buckets else 0.0,
        held=gradients * split if settings.accumulation > 1 else 0.0,
        whole=whole,
    )
    if settings.offload == "none":
        return shared
    shared = replace(shared, optimizer=0.0, temporary=0.0)
    return shared if settings.offload == "optimizer" else replace(shared, weights=0.0, adapter=0.0, gradients=0.0)


def _root(architecture: Architecture) -> float:
    """Parameters outside the layers: FSDP's root unit."""
    return float(architecture.embedding_parameters + architecture.head_parameters + architecture.final_norm)


def _activations(architecture: Architecture, settings: Settings, stack: Stack) -> tuple[float, float]:
    """Bytes that forward keeps, and the further bytes of one layer's backward."""
    if stack.whole_layers:
        adapters = max(len(modules) for _, modules in architecture.targeted(settings.targets))
        each, more = layer_bytes(architecture, settings.rank, adapters, settings.checkpointing)
        return each * architecture.num_layers * settings.tokens, more * settings.tokens + _mask_copies(settings)
    kept, work = activation_bytes(
        architecture, settings.tuning, settings.rank, settings.dropout, settings.targets, settings.precision,
        settings.adapter_bytes(stack), settings.attention == "eager", settings.masked, stack,
        settings.sequence_length if settings.attention == "eager" else 0, settings.quantized, settings.dora,
    )  # fmt: skip
    tokens, copies = settings.tokens, _mask_copies(settings)
    if settings.checkpointing == "none":
        everything = sum(count * size for count, size, _ in kept) * tokens + copies * architecture.num_layers
        return everything, max(grow for _, _, grow in kept) * tokens
    residual = 4 if settings.weight_bytes == 4 or (settings.quantized and stack.kbit_upcast) else 2
    boundary = (
        0
        if stack.offloads_checkpoints or settings.offload_activations
        else residual * architecture.hidden * architecture.num_layers
    )
    return boundary * tokens, work * tokens + copies


def _loss(
    architecture: Architecture, settings: Settings, stack: Stack, fixed: Fixed, cpu: bool
) -> tuple[float, float, float]:
    """Bytes of the loss in forward, in backward, and of the head's gradient while it is made."""
    vocab, hidden, tokens = architecture.vocab, architecture.hidden, settings.tokens
    c = settings.compute_bytes
    if METHODS[settings.method].scalar_head:
        return 0.0, 0.0, 0.0
    if stack.loss == "logits":
        return stack.logit_forward * vocab * tokens, stack.logit_backward * vocab * tokens, fixed.head_gradient
    if stack.loss == "tiles":
        tile = min(tokens, stack.chunk_tokens) * min(vocab, stack.tile_words)
        forward, backward = _CPU_TILE if cpu else (c, c)
        selected = c * hidden * tokens  # the hidden states of the trained positions, gathered
        head = (4 + settings.weight_bytes) * vocab * hidden if settings.tuning == "full" else 0.0
        return forward * tile + selected, backward * tile + selected + (4 + c) * hidden * tokens, head
    chunk = stack.chunk_tokens or _liger_chunk(tokens, vocab, hidden)
    logits, held = vocab * chunk, stack.logit_held * vocab * tokens
    backward = stack.logit_backward * logits + held + c * hidden * tokens
    return stack.logit_forward * logits + held, backward, fixed.head_gradient


def _liger_chunk(tokens: int, vocab: int, hidden: int) -> int:
    """Tokens per chunk of Liger's fused linear cross-entropy: next_pow2(T / ceil(V / H))."""
    return 1 << max(0, (max(1, -(-tokens // -(-vocab // hidden))) - 1).bit_length())


def _mask(settings: Settings) -> float:
    """Bytes of an explicit mask: one boolean per pair of positions."""
    return float(settings.rows * settings.sequence_length**2) if settings.masked else 0.0


def _mask_copies(settings: Settings) -> float:
    """Bytes of the additive mask that each call of SDPA makes of the boolean one and keeps for its backward."""
    return settings.compute_bytes * _mask(settings)


def _slack(moments: dict[Moment, dict[str, float]], stack: Stack, gpu: Gpu) -> float:
    """What the caching allocator holds beyond what is allocated: blocks that no later request fits.

    Blocks of every moment stay, whichever binds. Those of a loss over all logits leave the largest gaps: runs on
    A100-80GB reserved 4 to 8 GiB more than they allocated with one, and 1 to 2 GiB without.
    """
    if gpu.kind == "cpu":
        return 0.05 * max(sum(terms.values()) for terms in moments.values())
    moving = max(terms["activations"] + terms["buffers"] + terms["gradients"] for terms in moments.values())
    share = 0.5 if stack.loss == "logits" else 0.1
    return 0.04 * moving + share * moments["loss"]["logits"] + 0.05 * GIB


def context_bytes(gpu: Gpu, world_size: int) -> float:
    """CUDA context with lazy kernels, cuBLAS workspaces, NCCL; on the CPU the interpreter with its libraries."""
    if gpu.kind == "cpu":
        return 0.9 * GIB
    hopper = gpu.compute_capability[:1] in ("9", "1")
    return (0.6 if hopper else 0.5) * GIB + (1.0 * GIB if world_size > 1 else 0.0)


def _lever(moment: str, parts: dict[str, float], settings: Settings) -> str:
    """The setting that lowers the peak most, in words."""
    if moment == "rollout" and parts["buffers"] > parts["weights"]:
        return "a smaller batch_size: its answers are generated together"
    largest = max(("weights", "gradients", "optimizer", "activations", "logits"), key=lambda name: parts[name])
    if largest == "activations" and settings.checkpointing == "none":
        return "hardware.checkpointing: full"
    if largest in ("activations", "logits"):
        return "micro_batch: 1" if settings.micro_batch > 1 else "a shorter sequence_length"
    if settings.tuning == "full":
        return "tuning: lora" if largest != "optimizer" else "optimizer.name: adamw-8bit"
    if settings.quantization == "none":
        return "tuning: qlora"
    return "a shorter sequence_length" if moment != "optimizer" else "a smaller model"
