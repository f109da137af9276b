"""How far a prediction of memory may be off: a margin for each thing that is not known, not one percentage for all.

What is stored is counted exactly, so weights and states add almost nothing. What moves (activations, logits, gathered
layers) depends on which kernel saves what; the caching allocator's gaps and the driver's context on the order of
requests and on versions. Independent margins add as squares; those that move together, within one term, as they are.
"""

from __future__ import annotations

import math

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
