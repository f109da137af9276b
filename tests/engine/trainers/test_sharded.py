"""A model that is split over two ranks trains, is saved and goes on like a whole one."""

from __future__ import annotations

import dataclasses
import json
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


def _tensors(folder: Path, files: str = "*.safetensors") -> dict[str, Any]:
    return {name: t for file in folder.glob(files) for name, t in load_file(file).items()}


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
@pytest.mark.parametrize(("tuning", "rank"), [("lora", 3), ("lora", 1), ("qlora", 3)])  # one rank has fewer rows of it
def test_ten_steps_of_adapters_are_those_of_one_process_and_of_ddp(
    training_run: MakeRun, broad: Path, tuning: str, rank: int
) -> None:
    more: dict[str, Any] = {"steps": 10, "micro_batch": 2, "rank": rank, "alpha": 2.0 * rank, "eval_every": 5}
    recipe = {"tuning": {"type": tuning, "rank": rank}, "evaluation": {"every": 5, "holdout": 0.15, "keep_best": True}}
    recipe |= {"model": str(broad)}
    whole = training_run("llama", tuning, recipe, accumulation=4, **more)
    split = training_run("llama", tuning, recipe, accumulation=2, **more, **TWO)
    assert attempt(whole) == 0
    on_two_ranks(split)
    require_alike(split, whole)
    if tuning == "lora" and rank == 3:
        ddp = training_run("llama", tuning, recipe, accumulation=2, **more, gpus=[0, 1], strategy="ddp")
        on_two_ranks(ddp)
        require_alike(split, ddp)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["use_dora", "rank_stabilized"])
def test_variants_of_adapters_are_those_of_one_process(training_run: MakeRun, key: str) -> None:
    more: dict[str, Any] = {"steps": 4, "micro_batch": 2, "tuning_options": {key: True}}
    recipe = {"tuning": {"type": "lora", key: True}}
    whole = training_run("qwen3", "lora", recipe, accumulation=4, **more)
    split = training_run("qwen3", "lora", recipe, accumulation=2, **more, **TWO)
    assert attempt(whole) == 0
    on_two_ranks(split)
    require_alike(split, whole)
    assert json.loads((split.output_path / "adapter_config.json").read_text())[
        "use_dora" if key == "use_dora" else "use_rslora"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_it_goes_on_with_two_ranks_or_one(training_run: MakeRun, tuning: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"steps": 6, "micro_batch": 2}
    whole = training_run(
        "gemma" if tuning == "full" else "llama", tuning, accumulation=4, **more
    )  # gemma's head is tied
    split = training_run("gemma" if tuning == "full" else "llama", tuning, accumulation=2, **more, **TWO)
    assert attempt(whole) == 0
    on_two_ranks(split, str(Path(__file__).with_name("cut_worker.py")), str(split.path), "3", ends=False)
    assert len(losses(split)) == 3
    alone = with_one_rank(split, tmp_path / "alone")
    on_two_ranks(split)
    assert attempt(alone) == 0
    for run in (split, alone):
        require_went_on(run)
        require_alike(run, whole)


def with_one_rank(run: Run, folder: Path) -> Run:
    """A copy of a run, from here on by one process."""
    alone = Run(shutil.copytree(run.path, folder))
    plan = alone.plan
    resolved = dataclasses.replace(
        plan.resolved, gpus=[0], strategy="single", accumulation=2 * plan.resolved.accumulation
    )
    dataclasses.replace(plan, resolved=resolved).save(alone.path / "plan.json")
    return alone


def require_went_on(run: Run) -> None:
    """All six steps, the third twice: the last checkpoint was of step 2."""
    assert figures(run, "step") == [1, 2, 3, 4, 5, 6]
    assert len(events(run, "step")) == 7


@pytest.fixture
def broad(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model whose matrices are large enough for 8-bit states, on two ranks as on one; with more layers than are whole
    at a time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "broad"))
    config = AutoConfig.from_pretrained(
        str(folder), hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=5
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw-8bit", "lion-8bit"])
def test_states_in_8_bits_go_on_with_two_ranks_or_one(
    training_run: MakeRun, broad: Path, name: str, tmp_path: Path
) -> None:
    recipe = {"model": str(broad), "optimizer": {"name": name}}
    more: dict[str, Any] = {"steps": 6, "micro_batch": 2, "optimizer": name, "learning_rate": 1e-3}
    whole = training_run("llama", "full", recipe, accumulation=4, **more)
    split = training_run("llama", "full", recipe, accumulation=2, **more, **TWO)
    assert attempt(whole) == 0
    on_two_ranks(split, str(Path(__file__).with_name("cut_worker.py")), str(split.path), "3", ends=False)
    states = _tensors(split.path / "checkpoints" / "step-000002", "optimizer.safetensors")
    matrix, vector = 128 * 128, 128
    codes = [t for t in states.values() if str(t.dtype) == "torch.uint8" and t.numel() == matrix]
    assert codes, "no state is in 8 bits"
    assert sum(t.numel() == matrix // 256 for t in states.values()) == len(codes), "scales of another number of blocks"
    assert not [t for t in states.values() if str(t.dtype) == "torch.uint8" and t.numel() == vector]
    alone = with_one_rank(split, tmp_path / "alone")
    on_two_ranks(split)
    assert attempt(alone) == 0
    for run in (split, alone):
        require_went_on(run)
        # A last bit of a gradient may decide over a code, which are a few percent apart.
        assert losses(run) == pytest.approx(losses(whole), rel=1e-3)
        assert figures(run, "grad_norm") == pytest.approx(figures(whole, "grad_norm"), rel=1e-2)
        mine, theirs = _tensors(run.output_path), _tensors(whole.output_path)
        assert all(float((mine[n] - t).norm() / t.norm()) < 1e-3 for n, t in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tuning", "preference"), [
    ("dpo", "lora", {"reference": "live"}),
    ("dpo", "qlora", {"reference": "precomputed"}),
    ("dpo", "full", {}),
    ("kto", "lora", {}),
    ("kto", "lora", {"loss": "bco"}),
    ("orpo", "full", {}),
])  # fmt: skip
def test_answers_are_compared_as_in_one_process(
    method_run: Callable[..., Run], method: str, tuning: str, preference: dict[str, Any]
) -> None:
    recipe: dict[str, Any] = {"preference": preference, "evaluation": {"holdout": 0.2, "every": 4}}
    more: dict[str, Any] = {"steps": 4, "micro_batch": 2, "eval_every": 4}
    if method == "kto":  # which compares what is in a micro-batch on all ranks
        whole = method_run(method, tuning, recipe, accumulation=2, **more, gpus=[0, 1], strategy="ddp")
        on_two_ranks(whole)
    else:
        whole = method_run(method, tuning, recipe, accumulation=4, **more)
        assert attempt(whole) == 0
    split = method_run(method, tuning, recipe, accumulation=2, **more, **TWO)
    on_two_ranks(split)
    require_alike(split, whole)


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


@dataclasses.dataclass(frozen=True)
class OnTwo:
    """What two GPUs are told to do; ``near``: how far losses may lie from those of one."""

    tuning: str
    precision: str
    optimizer: str = "adamw"
    method: str = "sft"
    near: float = 0.02


@pytest.mark.cuda
@pytest.mark.parametrize("case", [
    OnTwo("full", "bf16-mixed"),
    OnTwo("full", "bf16"),
    OnTwo("full", "bf16", "adamw-8bit"),
    OnTwo("lora", "bf16"),
    OnTwo("qlora", "bf16"),
    OnTwo("qlora", "bf16", "paged-adamw-8bit"),
    OnTwo("lora", "bf16", method="dpo", near=0.05),
], ids=lambda case: f"{case.method}-{case.tuning}-{case.precision}-{case.optimizer}")  # fmt: skip
def test_two_gpus_hold_half_each(training_run: MakeRun, method_run: MakeRun, broad: Path, case: OnTwo) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    recipe = {"model": str(broad), "optimizer": {"name": case.optimizer}}
    more: dict[str, Any] = {
        "steps": 6, "micro_batch": 2, "device": "cuda", "precision": case.precision, "kernels": "auto",
        "checkpointing": "full", "optimizer": case.optimizer, "learning_rate": 1e-3 if case.tuning == "full" else 1e-2,
    }  # fmt: skip
    if case.tuning != "full" and "8bit" in case.optimizer:  # smaller halves of adapters have their states in 32 bits
        more |= {"rank": 64, "alpha": 8.0}

    def made(**how: Any) -> Run:
        if case.method == "sft":
            return training_run("llama", case.tuning, recipe, **more, **how)
        return method_run(case.method, case.tuning, {**recipe, "preference": {"reference": "live"}}, **more, **how)

    whole, split = made(accumulation=4), made(accumulation=2, **TWO)
    on_gpus(whole, 1)
    on_gpus(split, 2)
    assert losses(split) == pytest.approx(losses(whole), rel=case.near)
    assert not [told for told in events(split, "fallback") if "decoder_layer" in told["what"]]
    states = _tensors(split.path / "checkpoints" / "step-000006", "optimizer.safetensors")
    assert ("8bit" in case.optimizer) is any(
        t.dtype in (torch.int8, torch.uint8) and t.dim() == 2 for t in states.values()
    )


@pytest.mark.cuda
def test_two_gpus_go_on_in_8_bits_together_or_alone(training_run: MakeRun, broad: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    recipe = {"model": str(broad), "optimizer": {"name": "adamw-8bit"}}
    more: dict[str, Any] = {"micro_batch": 2, "device": "cuda", "precision": "bf16", "kernels": "auto",
                            "optimizer": "adamw-8bit", "learning_rate": 1e-3}  # fmt: skip
    split = training_run("llama", "full", recipe, accumulation=2, **more, **TWO)
    on_gpus(split, 2, str(Path(__file__).with_name("cut_worker.py")), str(split.path), "3", ends=False)
    alone = with_one_rank(split, tmp_path / "alone")
    on_gpus(split, 2)
    on_gpus(alone, 1)
    for run in (split, alone):
        require_went_on(run)
    assert losses(alone) == pytest.approx(losses(split), rel=0.02)


def on_gpus(run: Run, count: int, *worker: str, ends: bool = True) -> None:
    """Carry a run out by one rank or by two, each with a GPU; ``ends``: well."""
    path = os.pathsep.join([str(Path(finetui.__file__).parent.parent), *sys.path])
    visible = ",".join(str(gpu) for gpu in range(count))  # transformers would share one process's work among all
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    done = subprocess.run(
        [sys.executable, "-P", *ranks, *(worker or (*_WORKER, str(run.path)))],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": visible},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    logs = [run.log_path(rank) for rank in range(count)]
    assert (done.returncode == 0) is ends, "\n".join(log.read_text()[-3000:] for log in logs if log.exists())
