"""Whole runs over samples of about 200 tokens: packed into rows of 4,096, against padded batches.

    python -P tests/bench/packed_runs.py --shape llama-1b --json PATH        on a GPU
    python -P tests/bench/packed_runs.py --steps 6                           the tiny shape, CPU included

A checkpoint of that shape with random weights and bytes for tokens is made first. Each run is finetui's own worker in a
process by itself: packed rows; as many samples per step in micro-batches that the planner chooses; and one by one. The
figures are real tokens per second, padding not counted: the median over the later half of the steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetui.engine.bench.shapes import SHAPES, make
from finetui.engine.events import read_events
from finetui.engine.planning import plan_for
from finetui.engine.run import Run
from finetui.planner.recipe import Recipe

LIMIT, ROWS = 4096, 4
#: Samples that come to a step's rows.
SAMPLES = ROWS * LIMIT // 200
WAYS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "batch_size": ROWS},
    "padded": {"packing": False, "batch_size": SAMPLES},
    "one by one": {"packing": False, "batch_size": SAMPLES, "micro_batch": 1},
}
_WORK = "import sys; from finetui.engine.worker import attempt; from finetui.engine.run import Run; "
_WORK += "sys.exit(attempt(Run(sys.argv[1])))"


def write_rows(path: Path, count: int) -> None:
    """Texts of 100 to 300 letters."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz ,."
    rows = ["".join(draw.choices(letters, k=draw.randint(100, 300))).strip() + "." for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")


def measure(name: str, model: Path, rows: Path, root: Path, steps: int) -> float:
    """Real tokens per second of one run."""
    recipe = Recipe.build({
        "model": str(model), "method": "pretrain", "data": str(rows), "tuning": {"type": "lora", "rank": 16},
        "sequence_length": LIMIT, "max_steps": steps, "epochs": 1000, "evaluation": {"holdout": 0.0},
        "checkpoint": {"every": 10_000}, "track": [], **WAYS[name],
    })  # fmt: skip
    run = Run.create(recipe, plan_for(recipe), root=root, name=name.replace(" ", "-"))
    done = subprocess.run([sys.executable, "-P", "-c", _WORK, str(run.path)], check=False, capture_output=True)
    told = list(read_events(run.events_path))
    assert done.returncode == 0, [event.data for event in told if event.type == "failure"] or done.stderr.decode()
    took = [event.data for event in told if event.type == "step"][steps // 2 :]
    return statistics.median(step["tokens_per_s"] for step in took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(asked.shape, folder / "model")
        write_rows(folder / "rows.jsonl", 20 * SAMPLES)
        answer: dict[str, Any] = {"shape": asked.shape, "steps": asked.steps}
        for name in asked.ways:
            speed = measure(name, folder / "model", folder / "rows.jsonl", folder / "runs", asked.steps)
            answer[f"{name}: tokens per second"] = round(speed, 1)
            packed = answer.get("packed: tokens per second")
            ratio = f"   packed is {packed / speed:.2f} times as fast" if packed and name != "packed" else ""
            print(f"{name:12s} {speed:12,.0f} tokens/s{ratio}", flush=True)
            if asked.json:  # what is known so far
                asked.json.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
