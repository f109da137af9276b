"""A model that is split over two ranks trains, is saved and goes on like a whole one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
from safetensors.torch import load_file

import finetui
from finetui.engine.run import Run
from finetui.engine.worker import attempt

from .conftest import events, losses

MakeRun = Callable[..., Run]
TWO: dict[str, Any] = {"gpus": [0, 1], "strategy": "fsdp"}
_WORKER = ["-m", "finetui.engine.worker"]


def on_two_ranks(run: Run, *worker: str, ends: bool = True) -> None:
    """Carry a run out by two ranks on the CPU; ``ends``: well."""
    path = os.pathsep.join([str(Path(finetui.__file__).parent.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, *(worker or (*_WORKER, str(run.path)))],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) is ends, done.stderr[-2000:] + run.log_path(0).read_text()[-4000:]


def figures(run: Run, name: str) -> list[float]:
    """A figure of each step; of a repeated step the latest."""
    told = {step["step"]: step[name] for step in events(run, "step")}
    return [told[step] for step in sorted(told)]


def require_alike(run: Run, whole: Run) -> None:
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert figures(run, "grad_norm") == pytest.approx(figures(whole, "grad_norm"), rel=1e-4)
    assert figures(run, "tokens") == figures(whole, "tokens")
    told = [[event["loss"] for event in events(one, "eval")] for one in (run, whole)]
    assert told[0][-1] == pytest.approx(told[1][-1], rel=1e-5)
    mine, theirs = (_tensors(one.output_path) for one in (run, whole))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].dtype == tensor.dtype for name, tensor in theirs.items())
    assert all(mine[name].allclose(tensor, atol=2e-5) for name, tensor in theirs.items())
    assert {path.name for path in run.output_path.iterdir()} == {path.name for path in whole.output_path.iterdir()}


def _tensors(folder: Path) -> dict[str, Any]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_ten_steps_of_all_weights_are_those_of_one_process(training_run: MakeRun) -> None:
    more: dict[str, Any] = {"steps": 10, "micro_batch": 2, "checkpointing": "full", "eval_every": 5}
    recipe = {"evaluation": {"every": 5, "holdout": 0.15}, "checkpoint": {"every": 9}}
    whole = training_run("llama", "full", recipe, accumulation=4, **more)
    split = training_run("llama", "full", recipe, accumulation=2, **more, **TWO)
    assert attempt(whole) == 0
    on_two_ranks(split)
    require_alike(split, whole)
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(str(split.output_path), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded).__name__ == loaded.config.architectures[0] == "LlamaForCausalLM"
    assert events(split, "sample"), "nobody answered the held-out prompts"
    assert not events(split, "fallback")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 1])  # of two ranks one has fewer rows of it, or none
def test_ten_steps_of_adapters_are_those_of_one_process_and_of_ddp(training_run: MakeRun, rank: int) -> None:
    more: dict[str, Any] = {"steps": 10, "micro_batch": 2, "rank": rank, "alpha": 2.0 * rank, "eval_every": 5}
    recipe = {"tuning": {"type": "lora", "rank": rank}, "evaluation": {"every": 5, "holdout": 0.15, "keep_best": True}}
    whole = training_run("llama", "lora", recipe, accumulation=4, **more)
    split = training_run("llama", "lora", recipe, accumulation=2, **more, **TWO)
    assert attempt(whole) == 0
    on_two_ranks(split)
    require_alike(split, whole)
    if rank == 3:
        ddp = training_run("llama", "lora", recipe, accumulation=2, **more, gpus=[0, 1], strategy="ddp")
        on_two_ranks(ddp)
        require_alike(split, ddp)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_it_goes_on_with_two_ranks_or_one(training_run: MakeRun, tuning: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"steps": 6, "micro_batch": 2}
    whole = training_run(
        "gemma" if tuning == "full" else "llama", tuning, accumulation=4, **more
    )  # gemma's head is tied
    split = training_run("gemma" if tuning == "full" else "llama", tuning, accumulation=2, **more, **TWO)
    assert attempt(whole) == 0
    on_two_ranks(split, str(Path(__file__).with_name("cut_worker.py")), str(split.path), "3", ends=False)
    assert len(losses(split)) == 3
    alone = Run(shutil.copytree(split.path, tmp_path / "alone"))
    plan = alone.plan
    resolved = dataclasses.replace(plan.resolved, gpus=[0], strategy="single", accumulation=4)
    dataclasses.replace(plan, resolved=resolved).save(alone.path / "plan.json")
    on_two_ranks(split)
    assert attempt(alone) == 0
    for run in (split, alone):
        assert figures(run, "step") == [1, 2, 3, 4, 5, 6]
        assert len(events(run, "step")) == 7  # from step 2, where the last checkpoint was
        require_alike(run, whole)


@pytest.mark.slow
def test_16_bit_arithmetic_over_fp32_weights(training_run: MakeRun) -> None:
    more: dict[str, Any] = {"steps": 10, "micro_batch": 4, "precision": "bf16-mixed", "optimizer": "lion"}
    recipe = {"optimizer": {"name": "lion"}}
    whole = training_run("qwen3", "full", recipe, accumulation=2, learning_rate=1e-3, **more)
    split = training_run("qwen3", "full", recipe, accumulation=1, learning_rate=1e-3, **more, **TWO)
    assert attempt(whole) == 0
    on_two_ranks(split)
    assert losses(split) == pytest.approx(losses(whole), rel=0.02)
    state = _tensors(split.path / "checkpoints" / "step-000010")
    assert {str(t.dtype) for name, t in state.items() if name.startswith("model.")} == {"torch.float32"}


@pytest.mark.cuda
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_two_gpus_hold_half_each(training_run: MakeRun, tuning: str) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    more: dict[str, Any] = {
        "steps": 10, "micro_batch": 2, "device": "cuda", "precision": "bf16-mixed" if tuning == "full" else "bf16",
        "kernels": "auto", "checkpointing": "full",
    }  # fmt: skip
    whole = training_run("llama", tuning, accumulation=4, **more)
    split = training_run("llama", tuning, accumulation=2, **more, **TWO)
    assert attempt(whole) == 0
    path = os.pathsep.join([str(Path(finetui.__file__).parent.parent), *sys.path])
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, *_WORKER, str(split.path)], env={**os.environ, "PYTHONPATH": path}, timeout=600, check=False
    )
    assert done.returncode == 0, split.log_path(0).read_text()[-4000:]
    assert losses(split) == pytest.approx(losses(whole), rel=0.02)
    assert not [told for told in events(split, "fallback") if "decoder_layer" in told["what"]]
