"""Whole training runs beside those of other programs: tokens/s, peak memory, and how long the first step takes.

    python -P tests/bench/engine.py MODEL [--arms finetui unsloth trl-liger trl] [--checkpointing full none none+graphs]
        [--tuning lora] [--sequence-length 2048] [--micro-batch 4] [--rounds 2] [--turn 8] [--json FILE]
        [--skip finetui:full] [--profile FILE] [--apart] [--append FILE] [--folder DIR]

What ``finetui bench engine`` does, with what developers want besides: profiles, combinations left out, and programs
that load side by side, which spares minutes of a rented GPU (``--apart`` loads one after the other, so that the times
to the first step mean something). MODEL is a checkpoint folder; ``--make llama-8b`` writes one there with random
weights of that shape. How it is measured stands in ``engine/bench/turns.py`` and ``arms.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from finetui.engine.bench.shapes import SHAPES, make
from finetui.engine.bench.task import ARMS, MODES, TUNINGS, Task
from finetui.engine.bench.turns import facts, measure, tasks_of


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, and print one line of JSON for each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--make", choices=tuple(SHAPES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=tuple(ARMS))
    parser.add_argument("--checkpointing", nargs="+", default=["full", "none"], choices=MODES)
    parser.add_argument("--tuning", default="lora", choices=TUNINGS)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turn", type=int, default=8, help="timed steps of one arm in one round")
    parser.add_argument("--skip", nargs="+", default=[], metavar="ARM:MODE", help="as in finetui:full")
    parser.add_argument("--profile", type=Path, help="append what ran on the GPU in one more step of each arm")
    parser.add_argument("--kernels", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--apart", action="store_true", help="load one after the other")
    parser.add_argument("--timeout", type=float, default=240)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--append", type=Path, help="a file that gets each result as a line, the moment it is known")
    parser.add_argument("--folder", type=Path, help="keep what the arms print there")
    a = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if a.make and not (Path(a.model) / "config.json").is_file():
        make(a.make, a.model)
    first = Task(
        model=str(Path(a.model).resolve()),
        tuning=a.tuning,
        sequence_length=a.sequence_length,
        micro_batch=a.micro_batch,
        rounds=a.rounds,
        turn=a.turn,
        kernels=a.kernels,
        profile=a.profile is not None,
    )
    tasks = tasks_of(first, a.arms, a.checkpointing, _say)
    tasks = [task for task in tasks if f"{task.arm}:{task.mode}" not in a.skip]
    head = {"model": a.model, "tuning": a.tuning, "sequence_length": a.sequence_length, "micro_batch": a.micro_batch}

    def done(result: dict[str, Any]) -> None:
        print(json.dumps(result), flush=True)
        if a.append:
            with a.append.open("a", encoding="utf-8") as file:
                file.write(json.dumps(head | result) + "\n")

    together = not a.apart
    results = measure(
        tasks, _say, timeout_s=a.timeout, together=together, profile=a.profile, folder=a.folder, done=done
    )
    if a.json:
        told = {**facts(" ".join(sys.argv)), "results": results}
        a.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
