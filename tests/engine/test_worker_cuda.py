"""The same way on a CUDA GPU: formats, fused head and kernels of each tuning, and resuming."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.worker import attempt

from .yardstick import evaluate_run

# These tests are one rank in this process, which must not see the other GPUs of the machine.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

pytestmark = pytest.mark.cuda
MakeRun = Callable[..., Run]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in read_events(run.events_path) if event.type == kind]


@pytest.mark.parametrize("kernels", ["off", "auto"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("tuning", "precision"),
    [("full", "bf16"), ("full", "bf16-mixed"), ("lora", "bf16"), ("lora", "fp16"), ("qlora", "bf16")],
)
def test_trains_on_a_gpu(
    training_run: MakeRun, tuning: str, precision: str, checkpointing: str, kernels: str
) -> None:  # fmt: skip
    knobs = {"precision": precision, "checkpointing": checkpointing, "kernels": kernels, "device": "cuda"}
    run = training_run("qwen3", tuning, steps=4, learning_rate=3e-3, **knobs)
    assert attempt(run) == 0, run.events_path.read_text()
    assert all(math.isfinite(step["loss"]) for step in events(run, "step"))
    assert events(run, "warning") == []
    assert events(run, "memory")[-1]["peak_gib"] >= events(run, "memory")[-1]["allocated_gib"] > 0
    measured = [e["loss"] for e in events(run, "eval")]
    assert measured[-1] < measured[0]
    assert evaluate_run(run).loss == pytest.approx(measured[-1], rel=2e-2)


def test_the_fused_head_gives_the_losses_of_the_cpu(training_run: MakeRun) -> None:
    cpu, cuda = training_run(), training_run(device="cuda", kernels="off")
    assert attempt(cpu) == attempt(cuda) == 0
    found, expected = ([s["loss"] for s in events(run, "step")] for run in (cuda, cpu))
    assert found == pytest.approx(expected, rel=2e-3)


def test_an_interrupted_run_continues_on_a_gpu(training_run: MakeRun) -> None:
    whole, cut = training_run(device="cuda"), training_run(device="cuda")
    assert attempt(whole) == 0
    cut.request("stop")
    assert attempt(cut) == 0
    cut.withdraw("stop")
    assert attempt(cut) == 0
    found, expected = ([s["loss"] for s in events(run, "step")] for run in (cut, whole))
    assert found == pytest.approx(expected, rel=1e-4)
