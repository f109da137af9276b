"""The planner against measured runs: the scorer runs, and its errors stay where they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import finetui

ROOT = Path(finetui.__file__).parent


def test_measured_runs_are_predicted_within_their_bars():
    scorer = ROOT / "tests" / "bench" / "planner_accuracy.py"
    done = subprocess.run(
        [sys.executable, "-P", str(scorer), "--json"],
        env={"PYTHONPATH": str(ROOT.parent)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["answered"] >= 38
    assert result["answered"] + result["refused"] == 200
    assert sum(result["refusals"].values()) == result["refused"]
    trainer = [scores for name, scores in result["frameworks"].items() if name.startswith("HF Trainer/TRL")]
    assert sum(scores["rows"] for scores in trainer) == 31
    assert all(scores["memory_median"] < 0.05 for scores in trainer)
    assert all(scores["speed_median"] < 0.08 for scores in trainer)
