"""Makes the directory of a run that has been at work for days, in seconds.

    python tests/bench/long_run.py runs/long --events 1000000 --gpus 8

The figures are made up from a seed. At places that are known, there are what a viewer must not lose: held-out losses,
checkpoints, warnings, a second attempt that goes over some steps again, one loss that is far off and one that is not
a number.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from finetui.engine.run import Run
from finetui.engine.status import Status
from finetui.planner.recipe import Recipe

#: Seconds between two steps, and samples of GPUs and of the host per step.
STEP_S = 3.0
#: Steps between two evaluations, with a checkpoint after each.
EVAL_EVERY = 500


@dataclass(frozen=True)
class LongRun:
    """What is in the run, for tests: steps, events, and where the odd losses are."""

    path: Path
    steps: int
    events: int
    spike_at: int
    nan_at: int
    attempts: int = 2


def events_per_step(gpus: int) -> float:
    """A step, a reading of each GPU and of the host, and what comes less often."""
    return 1.1 + gpus + (gpus > 0)


def lines(count: int, gpus: int, begin: float) -> tuple[list[str], LongRun]:
    """About ``count`` events as lines, of a run that has done all its steps."""
    rng = random.Random(7)
    out: list[str] = []
    total = max(round(count / events_per_step(gpus)), 40)
    spike, broken, again = total // 3, total // 2, 2 * total // 3
    now = begin

    def say(kind: str, **data: object) -> None:
        head = {"seq": len(out) + 1, "time": round(now, 3), "type": kind}
        out.append(json.dumps({**head, **data}, separators=(",", ":")))

    say("state", state="preparing", message="", do="", attempt=1)
    say("state", state="running", message="", do="", attempt=1)
    say("eval", step=0, loss=2.5)
    step, attempt = 0, 1
    while step < total:
        step += 1
        now += STEP_S
        if step == again and attempt == 1:
            attempt, step = 2, again - 20
            now += 600
            say("state", state="preparing", message="", do="", attempt=2)
            say("state", state="running", message="", do="", attempt=2)
        loss: object = round(1.2 + 1.25 * math.exp(-8 * step / total) + rng.gauss(0, 0.05), 6)
        loss = 40.0 if step == spike else "nan" if step == broken else loss
        say("step", step=step, epoch=round(step / total, 4), loss=loss, learning_rate=2e-4 * (1 - step / total / 1.01),
            grad_norm=round(abs(rng.gauss(0.42, 0.06)), 6), tokens=step * 16384,
            tokens_per_s=round(rng.gauss(5123, 60), 2), step_s=STEP_S, steps=total)  # fmt: skip
        for index in range(gpus):
            say("gpu", index=index, name="NVIDIA H100 80GB HBM3", memory_used_gib=61.2, memory_total_gib=79.6,
                sm_percent=97.0, power_w=round(rng.gauss(642, 9), 1), temperature_c=67.0, sm_clock_mhz=1755.0,
                throttle=[])  # fmt: skip
        if gpus:
            say("host", cpu_percent=38.0, memory_used_gib=41.5, disk_free_gib=310.0, memory_total_gib=251.5)
        if step % 10 == 0:
            say("memory", rank=0, allocated_gib=9.1, reserved_gib=9.8, peak_gib=9.4)
        if step % EVAL_EVERY == 0:
            say("eval", step=step, loss=round(1.31 + 1.1 * math.exp(-8 * step / total), 6))
            say("checkpoint", step=step, path=f"checkpoints/step-{step:06d}", bytes=187_000_000, seconds=1.4)
        if step % 5000 == 17:
            say("warning", what=f"a warning of step {step}", where="long run", do="Nothing.")
    return out, LongRun(Path(), step, len(out), spike, broken)


def make(path: Path, events: int, gpus: int = 8, *, now: float | None = None) -> LongRun:
    """Make the directory, with a plan for the embedded default model; the run is written as one that was stopped."""
    from finetui.engine.planning import plan_for

    recipe = Recipe.load(Path(__file__).parents[2] / "presets" / "quickstart.yaml")
    run = Run.create(recipe, plan_for(recipe), root=path.parent, name=path.name)
    begin = round((time.time() if now is None else now) - STEP_S * events / events_per_step(gpus) - 700, 3)
    written, about = lines(events, gpus, begin)
    end = json.loads(written[-1])["time"]
    run.events_path.write_text("\n".join(written) + "\n", encoding="utf-8")
    status = Status("stopped", attempt=2, host=socket.gethostname(), created=begin, started=begin, ended=end)
    (run.path / "run.json").write_text(json.dumps(asdict(status)), encoding="utf-8")
    return LongRun(run.path, about.steps, about.events, about.spike_at, about.nan_at)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--gpus", type=int, default=8, help="0 leaves out samples of GPUs and host")
    arguments = parser.parse_args()
    made = make(arguments.path.resolve(), arguments.events, arguments.gpus)
    size = (made.path / "events.jsonl").stat().st_size / 2**20
    print(f"{made.path}: {made.events:,} events, {made.steps:,} steps, {size:.0f} MiB")


if __name__ == "__main__":
    main()
