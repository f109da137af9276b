"""The reasons for what the solver chose by memory and speed, in plain words, with the runner-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .architecture import Architecture
from .candidate import Candidate
from .hardware import GIB, Gpu
from .plan import Reason
from .settings import Settings
from .stacks import Stack

if TYPE_CHECKING:
    from .recipe import Recipe
    from .strategies import Obstacle


#: Predictions of speed that differ by less are taken as equal.
EQUALLY_FAST = 0.02

_ORDER = (
    "basis", "workload", "gpus", "strategy", "rollout", "sequence_length", "packing", "row_tokens", "batch_size",
    "micro_batch", "checkpointing", "quantization", "precision", "optimizer", "learning_rate", "train_on",
    "eval_every", "checkpoint_every", "kernels", "graphs", "price",
)  # fmt: skip


def explain_choice(
    recipe: Recipe,
    best: Candidate,
    tried: Sequence[Candidate],
    gpu: Gpu,
    limit: float,
    obstacle: Obstacle | None = None,
) -> list[Reason]:
    """One reason for each setting that was left to the solver.

    Args:
        tried: all that were looked at; each is compared with those that share the model as it does.
        obstacle: what keeps the model from being split over several devices.
    """
    chosen, reasons = best.settings, []
    everything, tried = tried, _like(best, tried, "strategy")
    if recipe.micro_batch == "auto":
        reasons.append(Reason("micro_batch", chosen.micro_batch, _micro_batch(best, tried, limit)))
    if recipe.hardware.checkpointing == "auto":
        reasons.append(Reason("checkpointing", chosen.checkpointing, _checkpointing(best, tried, limit)))
    if recipe.hardware.precision == "auto":
        reasons.append(Reason("precision", chosen.precision, _precision(best, tried, gpu, limit)))
    if recipe.optimizer.name == "auto":
        reasons.append(Reason("optimizer", chosen.optimizer, _optimizer(best, tried, limit)))
    if recipe.hardware.kernels == "auto":
        why = (
            "Triton kernels need a CUDA GPU"
            if gpu.kind == "cpu"
            else "those that prove themselves on this GPU are used"
        )
        reasons.append(Reason("kernels", "off" if gpu.kind == "cpu" else "auto", why))
    if recipe.hardware.strategy == "auto" and chosen.world_size > 1:
        reasons.append(Reason("strategy", chosen.strategy, _strategy(best, everything, limit, obstacle)))
    return reasons


def explain_experts(architecture: Architecture, settings: Settings, stack: Stack) -> list[Reason]:
    """What 4 and 8 bits leave out of a model with experts, since it may be most of it."""
    experts = architecture.expert_weights
    if not settings.quantized or not experts or stack.quantizes_experts:
        return []
    size = settings.compute_bytes * experts / GIB
    why = f"linear layers alone: experts are fused tensors that bitsandbytes leaves in 16 bits, {size:.1f} GiB"
    return [Reason("quantization", settings.quantization, why)]


def in_order(reasons: Sequence[Reason]) -> list[Reason]:
    """What every figure rests on first, then what the user decides about, then what runs by itself."""
    return sorted(reasons, key=lambda reason: _ORDER.index(reason.setting) if reason.setting in _ORDER else len(_ORDER))


def _like(best: Candidate, tried: Sequence[Candidate], *same: str) -> list[Candidate]:
    """The other candidates that agree with the best one in these settings."""
    return [
        candidate
        for candidate in tried
        if candidate is not best and all(_value(candidate, name) == _value(best, name) for name in same)
    ]


def _value(candidate: Candidate, name: str) -> object:
    return getattr(candidate.settings, name)


def _micro(candidate: Candidate) -> int:
    return candidate.settings.micro_batch


def _runner_up(candidates: Sequence[Candidate], key: Callable[[Candidate], float]) -> Candidate | None:
    return max(candidates, key=key, default=None)


def _against(best: Candidate, other: Candidate, limit: float) -> str:
    """How another candidate compares: it does not fit, or by how much it is slower or faster."""
    if not other.fits(limit):
        return f"would need {other.memory.device_gib:.1f} of {limit:.1f} GiB"
    if not other.fits(limit, safely=True):
        return f"might not fit (up to {other.memory.high_gib:.1f} of {limit:.1f} GiB)"
    ratio = other.speed.tokens_per_s / best.speed.tokens_per_s - 1
    if abs(ratio) < EQUALLY_FAST:
        return f"would be as fast, at {other.memory.device_gib:.1f} GiB"
    return f"would be {abs(ratio):.0%} {'faster' if ratio > 0 else 'slower'} at {other.memory.device_gib:.1f} GiB"


def _micro_batch(best: Candidate, tried: Sequence[Candidate], limit: float) -> str:
    others = [c for c in _like(best, tried, "precision", "optimizer") if c.settings.micro_batch != _micro(best)]
    if not others:
        return "nothing else divides the batch"
    near = min((_micro(candidate) for candidate in others), key=lambda size: abs(size - 2 * _micro(best)))
    same = [candidate for candidate in others if _micro(candidate) == near]
    other = _runner_up([c for c in same if c.fits(limit, safely=True)], lambda c: c.speed.tokens_per_s)
    other = other or min(same, key=lambda c: c.memory.device_gib)
    head = "the fastest that fits" if best.fits(limit) else "what needs least, and that does not fit"
    return f"{head}; {other.settings.micro_batch} {_against(best, other, limit)}"


def _checkpointing(best: Candidate, tried: Sequence[Candidate], limit: float) -> str:
    others = [c for c in tried if c.settings.checkpointing != best.settings.checkpointing]
    others = [
        c
        for c in others
        if (c.settings.precision, c.settings.optimizer) == (best.settings.precision, best.settings.optimizer)
    ]
    other = _runner_up([c for c in others if c.fits(limit, safely=True)], lambda c: c.speed.tokens_per_s)
    other = other or _runner_up(others, lambda c: -c.memory.device_gib)
    kept = best.settings.kept_layers
    head = {
        "none": "activations fit: nothing needs recomputing",
        "selective": f"the last {kept} layers keep what they made, the others compute it again: no more fit",
        "offload": "what layers keep waits in host memory, and little is computed again",
        "full": "recomputing saves memory",
    }[best.settings.checkpointing]
    if other is None:
        return head
    return f"{head}; {other.settings.checkpointing} {_against(best, other, limit)}"


def _strategy(best: Candidate, tried: Sequence[Candidate], limit: float, obstacle: Obstacle | None) -> str:
    if best.settings.strategy != "fsdp":
        whole = "each device holds the whole model and takes its share of the batch"
        return whole if best.fits(limit) or obstacle is None else f"{whole}; {obstacle.what}"
    world = best.settings.world_size
    split = f"weights, gradients and optimiser states are split over {world} devices, layer by layer"
    other = _runner_up([c for c in tried if c.settings.strategy == "ddp"], lambda c: -c.memory.device_gib)
    return f"{split}; ddp, which holds all of them on each, {_against(best, other, limit)}" if other else split


def _precision(best: Candidate, tried: Sequence[Candidate], gpu: Gpu, limit: float) -> str:
    precision = best.settings.precision
    if gpu.kind == "cpu":
        return "fp32 on the CPU: only the newest ones gain from bf16"
    if not gpu.bf16:
        return f"{gpu.name} has no bf16: fp16 with loss scaling"
    if best.settings.tuning != "full":
        return "the frozen weights stay in 16 bits"
    if precision == "bf16-mixed":
        return "fp32 weights under bf16 arithmetic lose no small updates, and they fit"
    other = _runner_up([c for c in tried if c.settings.precision == "bf16-mixed"], lambda c: -c.memory.device_gib)
    return f"weights in 16 bits; fp32 weights {_against(best, other, limit)}" if other else "weights in 16 bits"


def _optimizer(best: Candidate, tried: Sequence[Candidate], limit: float) -> str:
    if best.settings.optimizer == "adamw":
        return "AdamW, whose states fit" if best.fits(limit) else "AdamW"
    other = _runner_up([c for c in tried if c.settings.optimizer == "adamw"], lambda c: -c.memory.device_gib)
    what = "8-bit states" if best.settings.optimizer == "adamw-8bit" else "8-bit states that spill to host memory"
    return f"{what}; plain AdamW {_against(best, other, limit)}" if other else what
