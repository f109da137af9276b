"""Runs without a model, for tests of the processes around one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.run import Run
from finetui.planner.plan import Cost, HardwareSummary, Memory, ModelSummary, Plan, Resolved, Speed, Workload
from finetui.planner.recipe import Recipe

RESOLVED = Resolved(
    method="sft", tuning="lora", rank=8, alpha=16.0, dropout=0.0, targets="all-linear", quantization="none",
    sequence_length=128, micro_batch=1, accumulation=1, packing=False, train_on="answers", epochs=1.0, steps=15,
    warmup_steps=0, optimizer="adamw", learning_rate=2e-4, schedule="cosine", weight_decay=0.0, max_grad_norm=1.0,
    precision="fp32", checkpointing="none", attention="sdpa", kernels="off", strategy="single", device="cpu", gpus=[],
    checkpoint_every=10, eval_every=10, seed=0,
)  # fmt: skip


def a_plan(usd_per_h: float = 0.0, **resolved: Any) -> Plan:
    """A plan for a model that does not exist, with some knobs turned."""
    return Plan(
        model=ModelSummary("tiny", 1000, 10),
        hardware=HardwareSummary("CPU", 1, 8.0, kind="cpu", local=True),
        fits=True,
        memory=Memory(0.1, 0.1, 0.1, 0.1, 0.2),
        speed=Speed(100.0, 0.1, 0.1),
        time_s=10.0,
        cost=Cost(usd_per_h=usd_per_h),
        resolved=dataclasses.replace(RESOLVED, **resolved),
        workload=Workload(10, 1000),
    )


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """:func:`a_plan`."""
    return a_plan


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither see the runs of whoever runs them, nor leave theirs behind."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FINETUI_GPU_LOCKS", str(tmp_path / "gpus"))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Makes runs under a folder of the test, with a recipe and knobs of the plan."""

    def make(recipe: dict[str, Any] | None = None, *, name: str | None = None, **plan: Any) -> Run:
        built = Recipe.build({"model": "tiny", **(recipe or {})})
        return Run.create(built, a_plan(**plan), root=tmp_path / "runs", name=name)

    return make


# --- runs with a model: small random checkpoints of the families that people use

_ANSWERS = ("red like a rose", "blue like the sky", "green as grass", "as white as snow")
_SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint folder of ``llama``, ``qwen3``, ``mistral`` or ``gemma`` shape, with random weights."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        target = root / family
        if not target.exists():
            _write_checkpoint(target, family)
        return target

    return folder


def _write_checkpoint(target: Path, family: str) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        _ANSWERS * 9, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = AutoConfig.for_model(family, **_SHAPE, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 short prompts with one of four answers, of different lengths."""
    import json

    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"{'what is ' * (1 + i % 3)}colour {i}?", "completion": _ANSWERS[i % 4]} for i in range(28)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def training_run(
    make_run: Callable[..., Run], model_folder: Callable[[str], Path], rows_file: Path
) -> Callable[..., Run]:
    """Makes a run that really trains: six steps of eight rows, with a checkpoint and an evaluation every two."""
    import torch

    torch.set_num_threads(1)  # matrices this small are faster so, above all beside other work on the machine

    def make(family: str = "llama", tuning: str = "lora", recipe: dict[str, Any] | None = None, **plan: Any) -> Run:
        steps = plan.pop("steps", 6)
        asked = {
            "model": str(model_folder(family)), "tuning": tuning, "data": str(rows_file), "max_steps": steps,
            "epochs": 1000, "checkpoint": {"every": 2}, "evaluation": {"every": 2, "holdout": 0.15}, "track": [],
        }  # fmt: skip
        knobs = {
            "tuning": tuning, "quantization": "nf4" if tuning == "qlora" else "none", "micro_batch": 8, "steps": steps,
            "epochs": 1000.0, "learning_rate": 1e-2, "checkpoint_every": 2, "eval_every": 2, "gpus": [0],
            "schedule": "linear",
        }  # fmt: skip
        return make_run({**asked, **(recipe or {})}, **{**knobs, **plan})

    return make


@pytest.fixture
def power_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """Within it, a run in this process ends right after it has told of a step, the third unless said."""
    from finetui.engine.trainers.callbacks import Reporter

    tell = Reporter.on_log

    @contextmanager
    def cut(step: int = 3) -> Iterator[None]:
        def tell_and_end(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
            tell(self, args, state, *rest, **more)
            if state.global_step == step:
                raise RuntimeError("power cut")

        with monkeypatch.context() as patched:
            patched.setattr(Reporter, "on_log", tell_and_end)
            yield

    return cut


@pytest.fixture
def small_disk(file_system: Callable[[int], Path]) -> Path:
    """A file system of one MiB."""
    return file_system(1)
