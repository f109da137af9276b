"""What a finished run teaches the planner: its own figures, held against the plan that it carried out."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

from ..planner.calibration import Finished, compare, record
from ..planner.plan import Plan
from ..planner.state import state_dir
from .events import read_events
from .run import Run

#: Steps at the start that load kernels, fill the allocator and warm up clocks, and the fewest after them that count.
_WARM_UP, _LEAST_STEPS = 3, 8


def learn_from(run: Run, plan: Plan) -> Finished | None:
    """Add a finished run to the planner's history; None where it measured nothing that a plan predicts.

    Memory is that of the fullest rank, on CUDA alone: a process on the CPU holds more than its tensors. Speed is the
    median over all steps once the run was warm, so that pauses for evaluation and checkpoints don't count.
    """
    speeds: list[float] = []
    peaks: dict[int, float] = defaultdict(float)
    for event in read_events(run.events_path):
        if event.type == "step":
            speeds.append(event.data["tokens_per_s"])
        elif event.type == "memory":
            rank = event.data["rank"]
            peaks[rank] = max(peaks[rank], event.data["peak_gib"])
    warm = [speed for speed in speeds[_WARM_UP:] if speed > 0]
    finished = compare(
        plan,
        allocated_gib=max(peaks.values(), default=None) if plan.resolved.device == "cuda" else None,
        tokens_per_s=statistics.median(warm) if len(warm) >= _LEAST_STEPS else None,
        run=run.name,
        time=time.time(),
    )
    if finished.memory is None and finished.speed is None:
        return None
    record(finished, state_dir())
    return finished
