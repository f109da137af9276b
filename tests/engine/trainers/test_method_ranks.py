"""Two ranks train like one, whatever the method."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import finetui
from finetui.engine.run import Run
from finetui.engine.worker import attempt

from .conftest import events, losses, write_rows

MakeRun = Callable[..., Run]


def on_two_ranks(run: Run) -> None:
    above = str(Path(finetui.__file__).parent.parent)
    path = os.pathsep.join([above, *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "finetui.engine.worker", str(run.path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr + run.log_path(0).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tuning"), [("dpo", "lora"), ("orpo", "full")])
def test_two_ranks_train_like_one(method_run: MakeRun, method: str, tuning: str) -> None:
    recipe = {"evaluation": {"holdout": 0.3, "every": 2}}
    one = method_run(method, tuning, recipe, steps=4, micro_batch=2, accumulation=4)
    two = method_run(method, tuning, recipe, steps=4, micro_batch=2, accumulation=2, gpus=[0, 1], strategy="ddp")
    assert attempt(one) == 0
    on_two_ranks(two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert events(two, "step")[-1]["tokens"] == events(one, "step")[-1]["tokens"]

    def told(run: Run, name: str) -> list[float]:
        return [e["values"][name] for e in events(run, "metrics") if name in e["values"]]

    for name in ("rewards/margins", "rewards/accuracies", "eval_rewards/margins"):
        assert told(two, name) == pytest.approx(told(one, name), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo"])
def test_two_ranks_share_the_completions_of_a_prompt(training_run: MakeRun, tmp_path: Path, method: str) -> None:
    (tmp_path / "mine.py").write_text("def length(completions):\n    return [len(text) / 10 for text in completions]\n")
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"colour {i}?", "answer": "red"} for i in range(8)])
    recipe: dict[str, Any] = {
        "method": method, "data": str(rows), "rewards": [f"{tmp_path}/mine.py:length"],
        "rollout": {"max_completion_length": 5, "num_generations": 4, "beta": 0.1},
    }  # fmt: skip
    run = training_run(
        "llama", "lora", recipe, method=method, micro_batch=2, accumulation=1, steps=4, gpus=[0, 1], strategy="ddp",
    )  # fmt: skip
    on_two_ranks(run)
    rewards = [e["values"]["reward_std"] for e in events(run, "metrics") if "reward_std" in e["values"]]
    # Four completions of one prompt, two from each rank: they differ, so the ranks drew different words.
    assert rewards
    assert all(spread > 0 for spread in rewards)
    assert len(losses(run)) == 4
    saved = {path.name for path in (run.path / "checkpoints" / "step-000004").iterdir()}
    assert {"rank0.safetensors", "rank1.safetensors"} <= saved
