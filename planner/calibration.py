"""What finished runs teach: measured over predicted, kept per kind of run, used once it is trusted.

A kind is GPU, family, size and tuning, and how a run is spread over devices and replayed. A correction is the median
over at least three runs of the same kind, so one odd run (a busy GPU, a throttled one, a shared machine) bends nothing,
and it is bounded, so that no history makes a plan absurd. One run that was out of memory raises it at once, to what
that run held by then. It corrects what moves (activations, logits, buffers) and the speed; what is stored is counted
exactly. Ratios are against the formula, not against an already corrected prediction, so they don't feed on themselves.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .plan import Memory, Plan, Speed

#: Runs below which nothing is corrected, and how many of the latest count: drivers and libraries change.
LEAST_RUNS, LATEST_RUNS = 3, 15
#: Bounds of a correction of what moves in memory, and of speed.
MEMORY_BOUNDS, SPEED_BOUNDS = (0.7, 1.5), (0.4, 2.0)
#: Below this many GiB of what moves, its ratio is noise.
_LEAST_MOVING_GIB = 0.25
_FILE = "calibration.jsonl"


@dataclass(frozen=True)
class Kind:
    """Runs that resemble each other enough to learn from one another."""

    gpu: str
    family: str
    tuning: str
    size: int
    """Of the model, in powers of four: small models wait for launches, large ones for arithmetic."""
    framework: str = "finetui"
    strategy: str = "single"
    """How devices share: what a run waits for its peers, or holds for them, says nothing of one that has none."""
    graphs: bool = False
    """Whether steps are replayed as CUDA graphs, which have memory of their own and wait for no launch."""

    @classmethod
    def of(cls, plan: Plan, framework: str = "finetui") -> Kind:
        resolved, size = plan.resolved, size_of(plan.model.parameters)
        return cls(
            plan.hardware.gpu, plan.model.family, resolved.tuning, size, framework, resolved.strategy, resolved.graphs
        )


def size_of(parameters: int) -> int:
    """Powers of four, rounded: within a factor of two are alike."""
    return round(math.log(max(parameters, 1), 4))


@dataclass(frozen=True)
class Correction:
    """Factors on the formula's prediction, and how many runs they rest on."""

    memory: float = 1.0
    speed: float = 1.0
    runs: int = 0


@dataclass(frozen=True)
class Finished:
    """One finished run: its kind, and measured over the formula's prediction; None where it says nothing."""

    gpu: str
    family: str
    tuning: str
    size: int
    framework: str
    memory: float | None
    speed: float | None
    run: str = ""
    time: float = 0.0
    at_least: bool = False
    """The run was out of memory: ``memory`` is what it held by then, and it needed more."""
    strategy: str = "single"
    graphs: bool = False

    @property
    def kind(self) -> Kind:
        return Kind(self.gpu, self.family, self.tuning, self.size, self.framework, self.strategy, self.graphs)


def compare(
    plan: Plan, *, allocated_gib: float | None, tokens_per_s: float | None, run: str = "", time: float = 0.0
) -> Finished:
    """Hold a finished run against the plan that it carried out.

    Args:
        allocated_gib: the largest ``torch.cuda.max_memory_allocated`` of its ranks.
        tokens_per_s: the median over its steps once it was warm, over all ranks.
    """
    kind, applied = Kind.of(plan), plan.correction
    memory = speed = None
    moving = (plan.memory.allocated_gib - _stored(plan.memory)) / applied.get("memory", 1.0)
    if allocated_gib is not None and moving >= _LEAST_MOVING_GIB:
        memory = (allocated_gib - _stored(plan.memory)) / moving
    if tokens_per_s and plan.speed.tokens_per_s > 0:
        speed = tokens_per_s / (plan.speed.tokens_per_s / applied.get("speed", 1.0))
    return Finished(**asdict(kind), memory=memory, speed=speed, run=run, time=time)


def out_of_memory(plan: Plan, *, needed_gib: float, run: str = "", time: float = 0.0) -> Finished | None:
    """The lesson of a run whose GPU was too small for it; None where the plan had expected as much.

    Args:
        needed_gib: what its fullest rank held in tensors, and what it asked for beside, when there was no more.
    """
    lesson = replace(compare(plan, allocated_gib=needed_gib, tokens_per_s=None, run=run, time=time), at_least=True)
    expected = plan.correction.get("memory", 1.0)
    return lesson if lesson.memory is not None and lesson.memory > 1.01 * expected else None


def record(finished: Finished, folder: Path) -> None:
    """Append one run to the history in ``folder``; one write, so that several processes may append at once."""
    folder.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(asdict(finished)) + "\n").encode()
    handle = os.open(folder / _FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def history(folder: Path) -> list[Finished]:
    """The runs recorded in ``folder``, oldest first; lines that are broken or of another release are left out: one
    without a strategy may be of a run on several devices."""
    try:
        lines = (folder / _FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    known = {field.name for field in fields(Finished)}
    return [
        Finished(**{key: value for key, value in tree.items() if key in known})
        for tree in filter(None, map(_parsed, lines))
    ]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        tree = json.loads(line)
    except ValueError:
        return None
    needed = {field.name for field in fields(Kind)} | {"memory", "speed"}
    if not isinstance(tree, dict) or not needed <= set(tree):
        return None
    ratios = (tree["memory"], tree["speed"])
    return tree if all(r is None or (isinstance(r, int | float) and 0 < r < 100) for r in ratios) else None


def correction(runs: Iterable[Finished], kind: Kind) -> Correction | None:
    """The correction for runs of this kind, or None where too few were finished.

    A single run that was out of memory counts: what it held was there, whatever else was on its GPU.
    """
    alike = [run for run in runs if run.kind == kind][-LATEST_RUNS:]
    memory = _robust([run.memory for run in alike if run.memory is not None and not run.at_least], MEMORY_BOUNDS)
    held = max((run.memory for run in alike if run.memory is not None and run.at_least), default=0.0)
    if held > (memory or 1.0):
        memory = min(held, MEMORY_BOUNDS[1])
    speed = _robust([run.speed for run in alike if run.speed is not None], SPEED_BOUNDS)
    if memory is None and speed is None:
        return None
    return Correction(memory or 1.0, speed or 1.0, len(alike))


def _robust(ratios: list[float], bounds: tuple[float, float]) -> float | None:
    if len(ratios) < LEAST_RUNS:
        return None
    return min(max(statistics.median(ratios), bounds[0]), bounds[1])


def corrected_memory(memory: Memory, by: Correction) -> Memory:
    """A prediction with what moves scaled; its interval moves along."""
    moving = ("gradients", "activations", "logits", "buffers")
    held = sum(memory.terms[name] for name in moving)
    change = (by.memory - 1) * (memory.allocated_gib - _stored(memory))
    if held <= 0:
        return memory
    scale = (held + change) / held
    return replace(
        memory,
        allocated_gib=memory.allocated_gib + change,
        reserved_gib=memory.reserved_gib + change,
        device_gib=memory.device_gib + change,
        low_gib=max(memory.low_gib + change, 0.0),
        high_gib=memory.high_gib + change,
        terms={name: size * scale if name in moving else size for name, size in memory.terms.items()},
    )


def corrected_speed(speed: Speed, by: Correction) -> Speed:
    """A prediction with every term of a step scaled; its interval moves along."""
    return Speed(
        tokens_per_s=speed.tokens_per_s * by.speed,
        step_s=speed.step_s / by.speed,
        mfu=speed.mfu * by.speed,
        terms={name: seconds / by.speed for name, seconds in speed.terms.items()},
        low_tokens_per_s=speed.low_tokens_per_s * by.speed,
        high_tokens_per_s=speed.high_tokens_per_s * by.speed,
    )


def _stored(memory: Memory) -> float:
    return memory.terms["weights"] + memory.terms["adapter"] + memory.terms["optimizer"]
