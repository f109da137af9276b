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

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from .activations import activation_bytes
from .adapters import KEPT
from .architecture import Architecture
from .fused import cast_bytes, layer_bytes, stack_on
from .hardware import GIB, Gpu
from .interval import lean, margins
from .loss import loss_bytes, tail_bytes
from .masks import mask_bytes, mask_copies, masked_share, runs_eager, score_bytes
from .methods import METHODS, stack_for
from .plan import Memory
from .settings import Settings
from .shares import Shares, shares, shares_base, stored
from .stacks import Stack
from .storage import Fixed

Moment = Literal["loss", "backward", "optimizer", "rollout", "teacher"]
#: What the allocator holds beyond the widest micro-batch where their lengths differ, as a share of what that keeps:
#: eight runs on an A100 that state both held 1.0 to 1.3 times as much where rows were padded, and 1.6 to 2.2 where they
#: were flattened (fms-acceleration, refs_orca); its rules (``CUDACachingAllocator.cpp``: best fit, split, never given
#: back) leave 0.2 to 3 times over lengths drawn from a log-normal distribution.
VARIED = 1.2
#: How much of what layers without checkpoints keep leaves no such blocks, by the same rules.
SERVED = 0.6
#: A term that is a smaller share of the peak is not worth naming as what to lower.
_WORTH = 0.06


def peak_memory(
    architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, *, unknown: tuple[str, ...] = ()
) -> Memory:
    """Predict the peak of one device of ``gpu``.

    Args:
        unknown: what is not known about the run, names in :data:`.interval.UNKNOWN`; each widens the interval.
    """
    kind = _device(gpu.kind, gpu.bf16, gpu.compute_capability[:1])
    return _peak_memory(architecture, settings, stack, kind, unknown)


@cache
def _device(kind: Literal["cuda", "cpu"], bf16: bool, generation: str) -> Gpu:
    """All that memory depends on of a device."""
    return Gpu("", 0.0, 0.0, 0.0, 0.0, bf16=bf16, compute_capability=generation, kind=kind)


@lru_cache(maxsize=8192)
def _peak_memory(
    architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, unknown: tuple[str, ...]
) -> Memory:
    settings = settings.under(stack)
    stack = stack_for(settings.method, stack_on(architecture, settings, stack, gpu))
    fixed = stored(architecture, settings, stack)
    shared = shares(architecture, settings, stack, fixed)
    moments = moments_of(architecture, settings, stack, fixed, shared, gpu)
    static, needs = shared.static, {}
    for name, terms in moments.items():
        moving = sum(terms.values())
        unsure = unknowns(architecture, settings, stack, name, unknown)
        needs[name] = (moving + lean(stored=static, moving=moving, unknown=unsure), moving, unsure)
    moment = max(needs, key=lambda name: needs[name][0])
    need, moving, unknown = needs[moment]
    terms, raised, allocated = moments[moment], need - moving, static + need
    slack = slack_bytes(moments, settings, stack, gpu) + shared.whole.stranded
    context = context_bytes(gpu, settings.world_size) + stack.context_gib * GIB
    device = allocated + slack + context
    parts = {
        "weights": shared.weights,
        "adapter": shared.adapter,
        "gradients": terms["gradients"],
        "optimizer": shared.optimizer + terms["temporary"],
        "activations": terms["activations"],
        "logits": terms["logits"],
        "buffers": terms["buffers"] + raised + slack,
        "context": context,
    }
    off = margins(stored=static, moving=moving, slack=slack, context=context, unknown=unknown, followed=stack.followed)
    return Memory(
        allocated_gib=allocated / GIB,
        reserved_gib=(allocated + slack) / GIB,
        device_gib=device / GIB,
        low_gib=max(device - off["device"], 0.0) / GIB,
        high_gib=(device + off["device"]) / GIB,
        margins={name: size / GIB for name, size in off.items()},
        terms={name: size / GIB for name, size in parts.items()},
        moment=moment,
        lever=_lever(moment, parts, settings, cpu=gpu.kind == "cpu", packs=_packs(architecture, stack)),
    )


def unknowns(
    architecture: Architecture, settings: Settings, stack: Stack, moment: Moment, said: tuple[str, ...]
) -> tuple[str, ...]:
    """What is not known: what the caller says, and what follows from model, settings and stack."""
    found = {
        "shapes": not architecture.exact,
        "experts": settings.quantized
        and stack.quantizes_experts
        and not stack.linear_experts
        and architecture.expert_weights > 0,
        "packed": settings.quantized and stack.keeps_packed_inputs > 0,
        "kernels": stack.whole_layers,
        # Those of the optimiser are plain fractions, and those of finetui's own gathers stand from the start.
        "sharding": bool(settings.sharing.gathers) and moment != "optimizer" and not shares_base(settings, stack),
        "stack": not stack.certain,
    }
    return tuple(sorted({*said, *(name for name, so in found.items() if so)}))


def moments_of(
    architecture: Architecture, settings: Settings, stack: Stack, fixed: Fixed, shared: Shares, gpu: Gpu
) -> dict[Moment, dict[str, float]]:
    """Bytes beside the static ones at each moment: three, the rollout of methods that generate, a teacher's pass."""
    tokens, hidden, cpu = settings.tokens, architecture.hidden, gpu.kind == "cpu"
    copies, whole = shared.copies, shared.whole
    stages, moving = stages_of(architecture, settings, stack, fixed, copies)
    copies = 0.0 if stack.whole_layers else copies
    forward, backward, head = loss_bytes(architecture, settings, stack, fixed, cpu=cpu)
    dequantized = fixed.dequantized
    # Graphs are recorded on a stream beside the main one, into a pool of their own: each has its workspaces.
    workspaces = cublas_workspaces(gpu) * (3 if settings.graphs else 1)
    standing = mask_bytes(architecture, settings, stack) + shared.bucket + shared.buffers + workspaces
    if stack.keeps_scratch and settings.quantized and not cpu:  # a buffer that all layers share is never given back
        standing, dequantized = standing + scratch_bytes(architecture, settings, stack), 0.0
    loss = {
        "activations": sum(stage.count * stage.kept for stage in stages)
        + moving
        + tail_bytes(stack, settings) * hidden * tokens,
        "gradients": shared.held,
        "logits": max(forward, backward + head),
        "buffers": copies + standing + whole.loss + fixed.unpacked_head,
        "temporary": 0.0,
    }
    activations, gradients = _largest_backward(stages, settings, fixed, shared, 2.0 * hidden * tokens)
    last = held_to_the_end(stages, settings, stack, 2.0 * hidden * tokens)
    if last + shared.gradients + shared.whole.gradients > activations + gradients:
        activations, gradients = last, shared.gradients + shared.whole.gradients
    # Autocast's 16-bit copies of the layers that are kept, and of the one that is computed again.
    copied = min((settings.kept(architecture.num_layers) + 1) / max(architecture.num_layers, 1), 1.0)
    layer = {
        "activations": activations + moving,
        "gradients": gradients,
        "logits": stack.logit_alive * architecture.vocab * tokens,
        "buffers": dequantized + standing + whole.backward + copies * copied,
        "temporary": 0.0,
    }
    step = {
        "activations": 0.0,
        "gradients": shared.gradients,
        "logits": 0.0,
        "buffers": standing,
        "temporary": shared.temporary,
    }
    moments: dict[Moment, dict[str, float]] = {"loss": loss, "backward": layer, "optimizer": step}
    if METHODS[settings.method].rollouts:
        cache = kv_cache_bytes(architecture, settings)
        held = {"activations": 6.0 * hidden * settings.rows * settings.accumulation, "gradients": 0.0, "logits": 0.0}
        moments["rollout"] = {**held, "buffers": cache + copies + whole.loss, "temporary": 0.0}
    if settings.beside.teacher is not None:  # it reads the rows before the student does
        at_work = settings.beside.teacher.forward_bytes(settings.compute_bytes, settings)
        held = {"activations": at_work, "gradients": shared.held, "logits": 0.0}
        moments["teacher"] = {**held, "buffers": standing, "temporary": 0.0}
    return moments


@dataclass(frozen=True)
class Stage:
    """Layers under one policy: what each keeps until its backward, and what it needs besides while that runs."""

    count: int
    kept: float
    work: float


def stages_of(
    architecture: Architecture, settings: Settings, stack: Stack, fixed: Fixed, copies: float
) -> tuple[list[Stage], float]:
    """Layers in the order of backward, and bytes of parked tensors that are on the device on their way."""
    layers, tokens = architecture.num_layers, settings.tokens
    masks, share = mask_copies(architecture, settings, stack), masked_share(architecture, settings, stack)
    keeping = settings.kept(layers)
    merged = fixed.experts_merged  # PEFT adds the pairs of fused experts to a copy of them, which stays for backward
    eager, changed = runs_eager(architecture, settings, stack), _weight_changes(architecture, settings)
    stages, moving = [], 0.0
    for count, policy in ((keeping, "none"), (layers - keeping, settings.checkpointing)):
        if not count:
            continue
        if stack.whole_layers:
            full = settings.tuning == "full"  # whose MLPs' rows go through at once
            adapters = 0 if full else max(len(modules) for _, modules in architecture.targeted(settings.targets))
            policy = policy if policy != "selective" else "full"
            width, stream = settings.compute_bytes, 0 if settings.quantized else settings.worked_bytes
            need = layer_bytes(
                architecture, settings.rank, adapters, policy, 0 if full else tokens, width=width,
                stream=stream or width,
            )  # fmt: skip
            # The 16-bit copies of a layer's adapters wait with it; those of its weights are made for each product.
            waiting = 0.0 if full else copies / layers
            scores = score_bytes(architecture, settings)
            work = need.work * tokens + cast_bytes(architecture, settings)
            stages.append(Stage(count, need.kept * tokens + waiting + scores, work))
            moving += need.moving * tokens + (5 * scores if not moving else 0.0)
            continue
        kinds, work = activation_bytes(
            architecture, settings.tuning, settings.rank, settings.dropout, settings.targets, settings.between,
            settings.adapter_bytes(stack), eager, share > 0, stack,
            settings.sequence_length if eager else 0, settings.quantized, settings.dora, settings.kind,
        )  # fmt: skip
        if policy == "none":
            mean = sum(number * size for number, size, _ in kinds) / max(layers, 1)
            sparse = sum(layer.count for layer in architecture.layers if layer.experts) / max(layers, 1)
            grow = max(grow for _, _, grow in kinds)
            kept = mean * tokens + share * masks + sparse * merged + changed
            stages.append(Stage(count, kept, grow * tokens + 0.4 * merged))
            continue
        wide = settings.weight_bytes == 4 and settings.between != "bf16"
        residual = 4 if wide or (settings.quantized and stack.kbit_upcast) else 2
        parked = stack.offloads_checkpoints or policy == "offload"
        boundary = float(residual * architecture.hidden * tokens)
        kept = 0.0 if parked else boundary
        kept += _outputs(architecture) * tokens if settings.keeps_outputs else 0.0
        if stack.keeps_packed_inputs and settings.quantization.startswith("nf4"):
            kept += _packed_inputs(architecture) * tokens
        moving += 2 * boundary if parked else 0.0  # one on its way, one at work
        stages.append(Stage(count, kept, work * tokens + masks + 1.4 * merged + changed))
    return stages, moving


def _outputs(architecture: Architecture) -> float:
    """Bytes per token and layer, on average, of what is kept of layers that compute the rest again, in 16 bits."""
    attended = architecture.heads * architecture.value_dim
    wide = sum(layer.count * sum(module.d_out for module in layer.every_other) for layer in architecture.layers)
    return 2.0 * (wide / max(architecture.num_layers, 1) + attended)


def _packed_inputs(architecture: Architecture) -> float:
    """Bytes per token and layer, on average, of the inputs of 4-bit products in 16 bits: of attention's two, and of the
    MLP's two. What computes a layer again leaves them behind as forward does (bitsandbytes before 0.43)."""
    wide = sum(layer.count * layer.inner for layer in architecture.layers) / max(architecture.num_layers, 1)
    return 2.0 * (2 * architecture.hidden + architecture.heads * architecture.value_dim + wide)


def _weight_changes(architecture: Architecture, settings: Settings) -> float:
    """Bytes of one layer's changes of weights, which some adapters make whole and keep for their backward."""
    kept = KEPT.get(settings.kind)
    if kept is None:
        return 0.0
    return max(kept.fixed(modules, settings.rank) for _, modules in architecture.targeted(settings.targets))


def _largest_backward(
    stages: list[Stage], settings: Settings, fixed: Fixed, shared: Shares, last: float
) -> tuple[float, float]:
    """Activations and gradients at the worst layer of backward: kept ones are freed while gradients appear.

    Both change evenly within a stage, so its first and last layer are all that need a look; and the embedding, whose
    gradient is made last, dense, beside that of the head where the two are one weight.

    Args:
        last: bytes of the gradient of the embedding's output.
    """
    layers, kept = sum(stage.count for stage in stages), sum(stage.count * stage.kept for stage in stages)
    whole = shared.whole.gradients
    start = shared.held + (0.0 if whole else fixed.head_gradient)
    # Of a further micro-batch, a layer's gradients are there twice before they are added.
    again = fixed.layer_gradient if settings.tuning == "full" and settings.accumulation > 1 and not whole else 0.0
    end = max(shared.gradients, shared.held)
    worst, done = (last, end + whole), 0
    if settings.tuning == "full" and not whole and not settings.optimizer_in_backward:
        # What the second use of one weight gives is added, in place, to what the first gave.
        worst = (last, end + (fixed.embedding_gradient if fixed.tied else 0.0))
        end = max(end - (0.0 if fixed.tied else fixed.embedding_gradient), shared.held)
    for stage in stages:
        for after in {0, stage.count - 1}:
            share = (done + after) / max(layers - 1, 1)
            gradients = start + max(end - start, 0.0) * share + whole + again
            activations = kept - after * stage.kept + stage.work
            worst = max(worst, (activations, gradients), key=sum)
        done, kept = done + stage.count, kept - stage.count * stage.kept
    return worst


def held_to_the_end(stages: list[Stage], settings: Settings, stack: Stack, each: float) -> float:
    """Activations at the end of backward under FSDP1 over frozen layers, which holds what it should let go of; else 0.

    When the first layer is at work, gradients of the inputs of all but two others have come to what forward kept.

    Args:
        each: bytes of one layer's input.
    """
    sharded = settings.sharing.gathers == "layers" and settings.tuning != "full"
    again = [stage for stage in stages if stage.kept < stage.work]
    if not (stack.holds_input_gradients and sharded and again):
        return 0.0
    kept = sum(stage.count * stage.kept for stage in stages)
    return kept + again[-1].work + each * max(sum(stage.count for stage in again) - 2, 0)


def kv_cache_bytes(architecture: Architecture, settings: Settings) -> float:
    """Keys and values of all answers that one optimiser step learns from: they are generated at once.

    TRL generates ``steps_per_generation`` micro-batches together, which is the accumulation unless set.
    """
    per_token = 2.0 * architecture.kv_width * architecture.num_layers * 2
    return per_token * settings.sequence_length * settings.rows * settings.accumulation


def scratch_bytes(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """Bytes of the weights that finetui's kernels unpack at once, or turn over if they stay in 8 bits: attention or
    MLP, or gate and up where these run by themselves."""
    parts = [part for layer in architecture.layers for part in (layer.attention, layer.mlp)]
    if not stack.whole_layers:
        parts = [layer.mlp[:-1] for layer in architecture.layers]
    width = 1.0 if settings.quantization == "fp8" else 2.0
    return width * max(sum(module.weight for module in part) for part in parts)


def cublas_workspaces(gpu: Gpu) -> float:
    """cuBLAS's, one for forward's thread and one for backward's (``CUDABlas.cpp``): torch allocates them."""
    if gpu.kind == "cpu":
        return 0.0
    return 2.0 * (32.0 if gpu.compute_capability[:1] in ("9", "1") else 8.125) * 2**20


def slack_bytes(moments: dict[Moment, dict[str, float]], settings: Settings, stack: Stack, gpu: Gpu) -> float:
    """What the caching allocator holds beyond what is allocated: blocks that no later request fits.

    Blocks of every moment stay, whichever binds. Those of a loss over all logits leave the largest gaps: runs on
    A100-80GB reserved 4 to 8 GiB more than they allocated with one, and 1 to 2 GiB without. Segments that grow and
    shrink leave next to none: 0.02 to 0.46 GiB over eighteen runs on an H200. Where micro-batches differ in length,
    none fits the blocks of those before it (:data:`VARIED`).
    """
    if gpu.kind == "cpu":
        return 0.05 * max(sum(terms.values()) for terms in moments.values())
    moving = max(terms["activations"] + terms["buffers"] + terms["gradients"] for terms in moments.values())
    if stack.expandable_segments:
        # Those of a whole step: which layer of backward is the worst, and what has a gradient by then, may change.
        gradients = max(moments["loss"]["gradients"], moments["optimizer"]["gradients"])
        return 0.005 * moving + 0.12 * GIB + 0.15 * gradients
    share = 0.1
    if stack.loss == "logits":  # as much as its widest copy and the 16-bit one: 6 to 7 bytes a logit, fused or not
        share = min(stack.logit_gaps / max(stack.logit_forward, stack.logit_backward, 1.0), 0.8)
    gaps = 0.04 * moving + share * moments["loss"]["logits"] + 0.05 * GIB
    if not settings.varies:
        return gaps
    widest = max(terms["activations"] + terms["logits"] for terms in moments.values())
    if settings.checkpointing == "none":  # the many blocks of layers that keep everything serve one another
        widest -= SERVED * moments["loss"]["activations"]
    return max(gaps, VARIED * widest)


def context_bytes(gpu: Gpu, world_size: int) -> float:
    """CUDA context with lazy kernels, cuBLAS workspaces, NCCL; on the CPU the interpreter with its libraries."""
    if gpu.kind == "cpu":
        return 0.9 * GIB
    hopper = gpu.compute_capability[:1] in ("9", "1")
    return (0.6 if hopper else 0.5) * GIB + (1.5 * GIB if world_size > 1 else 0.0)


def _packs(architecture: Architecture, stack: Stack) -> bool:
    """Whether 4 bits would take in most weights: experts are no linear layers."""
    packed = architecture.linear_weights + (architecture.expert_weights if stack.quantizes_experts else 0)
    return 2 * packed > architecture.parameters


def _lever(moment: str, parts: dict[str, float], settings: Settings, *, cpu: bool, packs: bool) -> str:
    """The setting that lowers the peak most, in words: that of the largest term that any setting lowers."""
    if moment == "rollout" and parts["buffers"] > parts["weights"]:
        return "a smaller batch_size: its answers are generated together"
    terms = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")
    total = sum(parts.values())
    for name in sorted(terms, key=lambda name: -parts[name]):
        found = _lowers(name, settings, cpu=cpu, packs=packs)
        if name == "weights" and settings.beside.teacher is not None:
            found = settings.beside.teacher.lever(parts[name], settings) or found
        if found and parts[name] >= _WORTH * total:
            return found
    return "a smaller model"


def _lowers(name: str, settings: Settings, *, cpu: bool, packs: bool) -> str:
    """What lowers a term of memory; empty where nothing is left to set."""
    if name in ("activations", "logits"):
        if name == "activations" and settings.checkpointing in ("none", "selective"):
            return "hardware.checkpointing: full"
        return "micro_batch: 1" if settings.micro_batch > 1 else "a shorter sequence_length"
    if name == "optimizer" and not cpu and settings.optimizer == "adamw" and not settings.sharing.weights:
        return "optimizer.name: adamw-8bit"
    if settings.tuning == "full":
        return "tuning: lora"
    if name != "weights":
        return "a smaller tuning.rank"
    return "tuning: qlora" if settings.quantization == "none" and packs else ""
