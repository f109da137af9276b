"""How far a prediction may be off: a margin for each thing that is not known, not one percentage for all.

What is stored is counted exactly, so weights and states add almost nothing. What moves (activations, logits, gathered
layers) depends on which kernel saves what; the caching allocator's gaps and the driver's context on the order of
requests and on versions. Independent margins add as squares; those that move together, within one term, as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .architecture import Architecture
    from .hardware import Gpu
    from .stacks import Stack

#: Share of each term that it may be off, where the stack was read in its source.
STORED, MOVING, SLACK, CONTEXT = 0.01, 0.15, 0.8, 0.35
#: The same of what moves, where a step was followed through the real code and held against measured ones: it was off by
#: 5% at most (tests/bench/results).
FOLLOWED = 0.06
#: Fragments and workspaces that no term names, in bytes.
FLOOR = 0.15 * 2**30
#: What else may be unknown, to the share of (stored, moving) it may change.
UNKNOWN: dict[str, tuple[float, float]] = {
    "stack": (0.05, 0.35),  # what the framework keeps was taken from its documentation
    "program": (0.1, 0.5),  # which program ran is not known: it is taken for one on transformers' Trainer
    "length": (0.0, 0.35),  # only a bound on the longest row is known
    "batch": (0.0, 1.0),  # how many rows a micro-batch has is left out, and taken for one
    "short": (0.0, 0.8),  # rows are said to be short, whatever that is
    "checkpointing": (0.0, 0.4),  # whether layers compute again is what the program does unless told otherwise
    "metric": (0.03, 0.15),  # allocated, reserved or device: the figure's source does not say
    "compiled": (0.0, 0.25),  # a compiler decides what is kept and what is computed again
    "experts": (0.1, 0.3),  # how experts that are no nn.Linear are packed differs between versions
    "kernels": (0.0, 0.05),  # a layer that does not prove itself on the GPU runs as it was, and keeps more
    "shapes": (0.03, 0.1),  # the architecture was read by its shapes alone
    "packed": (0.05, 0.35),  # what old 4-bit products keep of their inputs, and how often
    "sharding": (0.05, 0.3),  # order and size of gathers differ between versions
    "strategy": (0.25, 0.3),  # how several devices share is taken for what the program does unless told otherwise
}

#: How far a prediction leans towards more where something is unknown, as a share of what that may change: too little
#: memory ends a run, too much of it costs a few percent of a card.
LEAN = 0.15
#: Unknowns that need no leaning: a bound on the length is taken for it, a short row for a longer one, a kernel that
#: falls back is told, and of all ways to share, each device with a copy of its own needs most.
_UPRIGHT = frozenset({"length", "short", "kernels", "strategy"})


def lean(*, stored: float, moving: float, unknown: tuple[str, ...] = ()) -> float:
    """Bytes that a prediction is raised by for what is unknown; arguments as in :func:`margins`."""
    return LEAN * math.sqrt(sum(_changed(name, stored, moving) ** 2 for name in unknown if name not in _UPRIGHT))


def _changed(name: str, stored: float, moving: float) -> float:
    return UNKNOWN[name][0] * stored + UNKNOWN[name][1] * moving


def margins(
    *,
    stored: float,
    moving: float,
    slack: float,
    context: float,
    unknown: tuple[str, ...] = (),
    followed: bool = False,
) -> dict[str, float]:
    """Bytes that allocated, reserved and device memory may be off, either way.

    Args:
        stored: weights, adapters, optimiser states.
        moving: all else that is allocated at the peak.
        slack: what the allocator holds beyond it.
        context: the driver's and the communication library's.
        unknown: names in :data:`UNKNOWN`.
        followed: whether what moves was followed through the stack's real code.
    """
    squares = [(STORED * stored) ** 2, ((FOLLOWED if followed else MOVING) * moving) ** 2, FLOOR**2]
    squares += [_changed(name, stored, moving) ** 2 for name in unknown]
    allocated = sum(squares)
    reserved = allocated + (SLACK * slack) ** 2
    device = reserved + (CONTEXT * context) ** 2
    if "metric" in unknown:  # each of the three may be what was measured
        allocated = reserved = (math.sqrt(device) + slack + context) ** 2
    return {"allocated": math.sqrt(allocated), "reserved": math.sqrt(reserved), "device": math.sqrt(device)}


#: Shares that each kind of term of a step's time may be off. Products: boost clocks and shapes. What moves through
#: memory: fused more or less than is reckoned. Links: how much of what they carry hides behind arithmetic. Generation:
#: lengths of answers.
_KINDS = {
    0.05: ("forward", "backward", "recompute", "attention", "reference"),
    0.2: ("elementwise", "dequantize", "optimizer", "teacher"),
    0.4: ("communication", "parking", "offload"),
    0.3: ("rollout",),
}
#: What else may be unknown, to the share of the step that it may change.
UNKNOWN_SPEED: dict[str, float] = {
    "device": 0.15,  # what its products reach was derived, not measured on such a chip
    "program": 0.1,  # its speed was not held against runs of our own; versions of torch differ
    "stack": 0.1,  # what the framework does was taken from its documentation
    "experts": 0.15,  # how a mixture sorts and pads what its experts get differs between versions
    "sharding": 0.15,  # gathers take bandwidth and units from what they hide behind, and Python time of their own
}
#: How fast and how slow a host starts kernels against what is assumed: that of an H200 took 17 to 31 µs for the same
#: one within a minute, where 32 are assumed. The same where :mod:`.ceilings` knows this very host.
HOSTS, HOST_MEASURED = (0.6, 1.8), (0.85, 1.25)


def unknown_speed(architecture: Architecture, stack: Stack, gpu: Gpu, *, sharded: bool) -> tuple[str, ...]:
    """Names in :data:`UNKNOWN_SPEED` that hold for a run."""
    experts = any(layer.experts for layer in architecture.layers)
    told = {
        "device": not gpu.measured, "program": not stack.followed, "stack": not stack.certain, "experts": experts,
        "sharding": sharded,
    }  # fmt: skip
    return tuple(name for name, holds in told.items() if holds)


def step_range(
    terms: dict[str, float], unknown: tuple[str, ...], *, waits: Callable[[float], float], host_measured: bool
) -> tuple[float, float]:
    """The shortest and the longest that a step may take, in seconds.

    Args:
        terms: of the step, in seconds.
        unknown: names in :data:`UNKNOWN_SPEED`.
        waits: further seconds that the device waits for a host that takes that many times as long to start kernels.
        host_measured: whether that time was measured on this host.
    """
    step_s = sum(terms.values())
    squares = [(share * sum(terms.get(name, 0.0) for name in names)) ** 2 for share, names in _KINDS.items()]
    squares += [(UNKNOWN_SPEED[name] * step_s) ** 2 for name in unknown]
    # Shares that add up to all would leave no time at all.
    margin, (fast, slow) = min(math.sqrt(sum(squares)), 0.5 * step_s), HOST_MEASURED if host_measured else HOSTS
    return step_s + waits(fast) - margin, step_s + waits(slow) + margin
