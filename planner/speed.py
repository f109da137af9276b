"""Time of one optimiser step, term by term: a roofline.

Matrix products run at ``achievable`` of the peak at best, less for small ones; elementwise work, dequantisation and
the optimiser at the speed of memory (:mod:`.work`); the device waits where the host starts kernels more slowly than
they run (:mod:`.launching`), for its peers and for host memory (:mod:`.links`).
"""

from __future__ import annotations

from .architecture import Architecture
from .hardware import Gpu
from .interval import step_range, unknown_speed
from .launching import LAUNCH_CPU_S, LAUNCH_S, agrees, launched_s, loop_s, uncompiled, waited_s
from .links import communication_s, offload_s, parking_s
from .memory import kv_cache_bytes
from .methods import METHODS
from .plan import Speed
from .settings import Settings
from .stacks import Stack
from .traffic import KERNELS, optimizer_launch_s, optimizer_traffic
from .work import BANDWIDTH_SHARE, Work, as_run


def step_speed(
    architecture: Architecture,
    settings: Settings,
    stack: Stack,
    gpu: Gpu,
    *,
    useful: float = 1.0,
    mean_length: float | None = None,
) -> Speed:
    """Predict one optimiser step.

    Args:
        useful: share of the tokens in a batch that are not padding.
        mean_length: tokens that attention spans, where that is less than the sequence length; a mask hides that from
            attention, unless layers run as one function.

    Returns:
        tokens/s over all devices, padding not counted; ``mfu`` is useful model FLOPs (6 N per token, 4 N frozen, no
        recomputation) over the device's peak.
    """
    settings, stack = as_run(architecture, settings, stack, gpu)
    work = Work.of(architecture, settings, stack, gpu, mean_length=mean_length)
    terms = work.seconds
    host = launched_s(architecture, settings, stack, gpu)
    # How many kernels compiled layers launch was not counted: no more than they would uncompiled.
    most = host if stack.certain or not stack.compiled else launched_s(architecture, settings, uncompiled(stack), gpu)
    if settings.beside.forwards:  # over the same tokens, without gradients
        terms["reference"] = settings.beside.forwards * (terms["forward"] + terms["attention"] / work.passes)
    if settings.beside.teacher is not None:
        terms["teacher"] = settings.beside.teacher.seconds(architecture, settings, work, gpu)
    busy = _passes(terms, work, settings.recomputed(architecture.num_layers))
    ahead = stack.runs_ahead and not agrees(settings, stack)

    def waits(slower: float) -> float:
        """Seconds of one micro-batch that are waited for a host that takes ``slower`` times as long."""
        launched = most if slower > 1 else host
        if gpu.kind == "cpu":  # nothing is launched ahead: each operation waits for the one before
            return slower * sum(launched)
        return waited_s(busy, (slower * launched[0], slower * launched[1]), ahead=ahead)

    terms["launch"] = waits(1.0)
    if settings.checkpointing == "offload":
        forward_s = (sum(terms.values()) - terms["recompute"] - terms.get("teacher", 0.0)) / 3
        terms["parking"] = parking_s(architecture, settings, stack, gpu, forward_s)
    # What is sent behind backward goes on while the device waits for the host.
    idle_s = terms["launch"]
    compute_s, backward_s = sum(terms.values()), terms["backward"] + idle_s
    terms = {name: seconds * settings.accumulation for name, seconds in terms.items()}
    states = 1.0 if settings.offload == "none" else 0.0
    share = settings.sharing.share("optimizer", settings.world_size)
    update = optimizer_traffic(architecture, settings, stack) / work.bandwidth
    if gpu.kind == "cuda":
        update += optimizer_launch_s(architecture, settings, stack)
    terms["optimizer"] = states * share * update
    terms["communication"] = communication_s(architecture, settings, stack, gpu, compute_s, backward_s, idle_s)
    if METHODS[settings.method].rollouts:
        terms["rollout"] = _rollout_s(architecture, settings, gpu)
    terms["offload"] = offload_s(architecture, settings, gpu)
    terms["launch"] += loop_s(settings, stack, gpu)
    step_s = sum(terms.values())
    world = settings.world_size
    per_step = work.tokens * settings.accumulation * useful
    low_s, high_s = step_range(
        terms,
        unknown_speed(architecture, stack, gpu, sharded=settings.sharing.weights),
        waits=lambda slower: settings.accumulation * (waits(slower) - waits(1.0)),
        host_measured=gpu.launch_s > 0,
    )
    model_flops = per_step * (work.forward + work.backward + 3 * work.attention)
    return Speed(
        tokens_per_s=per_step * world / step_s,
        step_s=step_s,
        mfu=model_flops / step_s / work.peak,
        terms=terms,
        low_tokens_per_s=per_step * world / high_s,
        high_tokens_per_s=per_step * world / low_s,
    )


def _passes(terms: dict[str, float], work: Work, again: float) -> tuple[float, float]:
    """Seconds that the device is busy with one micro-batch: with its forwards; with its backward, and all made again.

    Of elementwise work a third is forward's where nothing is made again, of unpacking half.
    """
    others = terms.get("reference", 0.0) + terms.get("teacher", 0.0)
    forward = terms["forward"] + others + terms["attention"] / work.passes
    forward += terms["elementwise"] / (3 + again) + terms["dequantize"] / (2 + again)
    return forward, sum(terms.values()) - forward


def _rollout_s(architecture: Architecture, settings: Settings, gpu: Gpu) -> float:
    """Seconds of generating the answers of one step with transformers: for each token all weights are read, and half of
    the cache on average; its kernels are launched one by one. vLLM is 5 to 10 times faster (published surveys). The
    longest answer decides, since a batch ends together; several updates on the same answers share them.
    """
    bandwidth = gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE
    weights = 2.0 * architecture.parameters
    launch = KERNELS * architecture.num_layers * ((gpu.launch_s or LAUNCH_S) if gpu.kind == "cuda" else LAUNCH_CPU_S)
    each = max((weights + kv_cache_bytes(architecture, settings) / 2) / bandwidth, launch)
    return settings.beside.completion * each / settings.beside.updates
