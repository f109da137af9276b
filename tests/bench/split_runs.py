"""Whole runs on several GPUs, the model whole on each (ddp) or split among them (fsdp): memory against plan, speed.

    python -P tests/bench/split_runs.py --shape qwen3-4b --tuning full --json PATH      on two GPUs
    python -P tests/bench/split_runs.py --steps 6                                       the tiny shape, CPU included

A checkpoint of that shape with random weights and bytes for tokens is made first. Each run is finetui's own, supervisor
and all. Memory is the peak that PyTorch's allocator told of, of the rank with the highest, beside the plan's
``allocated_gib``; speed is the median over the later half of the steps, beside the plan's. Of each checkpoint it tells
how large it was, for how long a step waited and after how long all was proven on the disk; of the result, how long it
took to write. A run that is at it when its time is over is told of as far as it came.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetui.engine import launcher
from finetui.engine.bench.shapes import SHAPES, make
from finetui.engine.events import read_events
from finetui.engine.planning import plan_for
from finetui.engine.run import Run
from finetui.engine.status import LIVE_STATES
from finetui.planner.recipe import Recipe


def write_rows(path: Path, count: int, length: int) -> None:
    """Texts of so many letters and a full stop."""
    draw = random.Random(0)
    rows = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz,.", k=length)) + "." for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")


def saved(data: dict[str, Any]) -> dict[str, Any]:
    """What one checkpoint took."""
    size = round(data["bytes"] / 2**30, 2)
    return {"step": data["step"], "GiB": size, "waited s": data["waited_s"], "s": data["seconds"]}


def written(told: Sequence[Any]) -> float | None:
    """Seconds from when the result began to be written to the end of the run; None if it did not come to that."""
    begun = [event.time for event in told if event.type == "phase" and event.data["phase"] == "writing the result"]
    ended = [event.time for event in told if event.type == "state" and event.data["state"] == "finished"]
    return round(ended[-1] - begun[-1], 1) if begun and ended else None


def measure(strategy: str, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What one run was planned to need and to reach, and what it did."""
    recipe = Recipe.build({
        "model": str(asked.models / asked.shape), "method": "pretrain", "data": str(folder / "rows.jsonl"),
        "tuning": asked.tuning, "sequence_length": asked.length, "batch_size": 8 * asked.gpus, "max_steps": asked.steps,
        "epochs": 1000, "evaluation": {"holdout": 0.0}, "checkpoint": {"every": 10_000, "keep": 1}, "track": [],
        "optimizer": {"name": "adamw"},
        "hardware": {"gpus": asked.gpus, "strategy": strategy, "precision": asked.precision},
    })  # fmt: skip
    plan = plan_for(recipe)
    run = Run.create(recipe, plan, root=folder / "runs", name=strategy)
    launcher.start(run)
    until = time.monotonic() + asked.seconds
    while run.status.state in LIVE_STATES:
        time.sleep(1.0)
        if time.monotonic() > until:
            launcher.kill(run)
    told = list(read_events(run.events_path))
    steps = [event.data for event in told if event.type == "step"]
    if asked.phases or len(steps) < asked.steps:
        lines = (
            f"{event.time - told[0].time:6.1f} s  {event.type}  {str(event.data)[:200]}"
            for event in told
            if event.type in ("state", "phase", "step", "failure", "fallback", "checkpoint")
        )
        print("\n".join(lines), flush=True)
    assert len(steps) == asked.steps, f"{len(steps)} steps in the time that there was"
    began = min(event.time for event in told if event.type == "step") - told[0].time
    peak = max(event.data["peak_gib"] for event in told if event.type == "memory")
    return {
        "fits": plan.fits, "checkpointing": plan.resolved.checkpointing, "micro_batch": plan.resolved.micro_batch,
        "planned GiB": round(plan.memory.allocated_gib, 2), "measured GiB": peak,
        "planned tokens/s": round(plan.speed.tokens_per_s),
        "measured tokens/s": round(statistics.median(step["tokens_per_s"] for step in steps[len(steps) // 2 :])),
        "tokens a step": (steps[-1]["tokens"] - steps[0]["tokens"]) // max(len(steps) - 1, 1),
        "s a step": [round(step["step_s"], 3) for step in steps],
        "first step after s": round(began, 1), "last loss": steps[-1]["loss"],
        "checkpoints": [saved(event.data) for event in told if event.type == "checkpoint"],
        "after the last step s": round(told[-1].time - max(e.time for e in told if e.type == "step"), 1),
        "writing the result s": written(told),
        "ended": run.status.state,
        "fallbacks": [event.data["what"] for event in told if event.type == "fallback"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--tuning", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument("--precision", choices=("auto", "bf16", "bf16-mixed", "fp32"), default="auto")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which a run is ended where it is")
    parser.add_argument("--phases", action="store_true", help="print each phase, step and checkpoint with its time")
    parser.add_argument("--ways", nargs="+", choices=("ddp", "fsdp"), default=["ddp", "fsdp"])
    parser.add_argument("--models", type=Path, help="where checkpoints are kept and looked for; else they are not kept")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        asked.models = asked.models or folder
        if not (asked.models / asked.shape / "config.json").is_file():
            make(asked.shape, asked.models / asked.shape)
        # A letter is a token; with a full stop and both ends of a text a row is as long as a sequence, and none is cut.
        write_rows(folder / "rows.jsonl", 64 * asked.gpus, asked.length - 3)
        answer: dict[str, Any] = {"shape": asked.shape, "tuning": asked.tuning, "gpus": asked.gpus}
        for strategy in asked.ways:
            answer[strategy] = measure(strategy, asked, folder)
            print(strategy, json.dumps(answer[strategy]), flush=True)
            if asked.json:  # what is known so far
                asked.json.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
