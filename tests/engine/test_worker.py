"""A rank's whole way, in process: model, data, training, result; and what it says when it goes wrong."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from finetui.engine.checkpoints import store
from finetui.engine.events import read_events
from finetui.engine.run import Run
from finetui.engine.worker import attempt

from .yardstick import evaluate_run

MakeRun = Callable[..., Run]
PowerCut = Callable[..., AbstractContextManager[None]]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in read_events(run.events_path) if event.type == kind]


def losses(run: Run) -> dict[int, float]:
    """The loss of each step; of a repeated step the latest."""
    return {step["step"]: step["loss"] for step in events(run, "step")}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma"])
@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_trains_and_leaves_something_that_loads(training_run: MakeRun, family: str, tuning: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = training_run(family, tuning, steps=3, learning_rate=3e-3 if tuning == "full" else 1e-2)
    assert attempt(run) == 0, run.events_path.read_text()
    steps = events(run, "step")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert events(run, "warning") == []
    measured = [e["loss"] for e in events(run, "eval")]
    assert measured[-1] < measured[0]
    output = run.output_path
    tokenizer = AutoTokenizer.from_pretrained(output)
    if tuning == "full":
        model: Any = AutoModelForCausalLM.from_pretrained(output)
    else:
        base = AutoModelForCausalLM.from_pretrained(run.recipe.model)
        model = PeftModel.from_pretrained(base, str(output))
        told = json.loads((output / "adapter_config.json").read_text())
        assert told["base_model_name_or_path"] == run.recipe.model
    text = tokenizer.apply_chat_template([{"role": "user", "content": "colour?"}], tokenize=False)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()
    assert {2, tokenizer.convert_tokens_to_ids("<|im_end|>")} <= set(_stops(output))
    assert evaluate_run(run).loss == pytest.approx(measured[-1], rel=1e-5)
    assert evaluate_run(run, base=True).loss == pytest.approx(measured[0], rel=1e-5)


def _stops(output: Path) -> list[int]:
    return list(json.loads((output / "generation_config.json").read_text())["eos_token_id"])


def test_events_of_a_run(training_run: MakeRun) -> None:
    run = training_run(recipe={"track": ["tensorboard"]})
    assert attempt(run) == 0
    assert [c["step"] for c in events(run, "checkpoint")] == [1, 2, 4, 6]
    assert [e["step"] for e in events(run, "eval")] == [0, 2, 4, 6]
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert {s["step"] for s in events(run, "sample")} == {0, 6}
    first = events(run, "sample")[0]
    assert first["prompt"].endswith("?")
    assert not first["prompt"].startswith("user")
    assert first["expected"] in {"red like a rose", "blue like the sky", "green as grass", "as white as snow"}
    assert {s["steps"] for s in events(run, "step")} == {6}
    assert events(run, "memory")[0]["peak_gib"] > 0
    assert run.recorded.state == "running"
    assert list((run.path / "tensorboard").iterdir())


def test_tokens_are_counted_exactly(training_run: MakeRun) -> None:
    from finetui.engine.data.prepare import prepare
    from finetui.engine.evaluate import data_cache, data_settings
    from finetui.engine.models.load import load_tokenizer
    from finetui.engine.trainers.order import Order

    run = training_run(micro_batch=4, accumulation=2, steps=3)
    assert attempt(run) == 0
    resolved = run.plan.resolved
    tokenizer, _ = load_tokenizer(Path(run.recipe.model))
    rows = prepare(run.recipe, data_settings(resolved), tokenizer, data_cache(run)).train
    order = Order(rows=len(rows), steps=3, micro_batch=4, accumulation=2, seed=resolved.seed)
    expected = sum(len(rows[i]["input_ids"]) for batch in order for i in batch)
    assert events(run, "step")[-1]["tokens"] == expected


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(training_run: MakeRun) -> None:
    whole, cut = training_run(steps=4), training_run(steps=4, micro_batch=2, accumulation=4)
    assert attempt(whole) == attempt(cut) == 0
    assert losses(cut) == pytest.approx(losses(whole), rel=2e-6)


def test_packed_equals_unpacked(training_run: MakeRun) -> None:
    plain, packed = training_run(steps=1), training_run(steps=1, packing=True, micro_batch=1)
    assert attempt(plain) == attempt(packed) == 0
    rows = [json.loads(next((r.path / "data").glob("*/facts.json")).read_text()) for r in (plain, packed)]
    assert rows[1]["eval_rows"] < rows[0]["eval_rows"]
    first, second = (events(run, "eval")[0]["loss"] for run in (plain, packed))
    assert second == pytest.approx(first, rel=1e-5)


def test_checkpointed_activations_give_the_same_losses(training_run: MakeRun) -> None:
    plain, again = training_run(steps=3), training_run(steps=3, checkpointing="full")
    assert attempt(plain) == attempt(again) == 0
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize(
    ("tuning", "knobs"),
    [
        ("full", {"precision": "bf16"}),
        ("full", {"precision": "bf16-mixed", "optimizer": "adamw-8bit"}),
        ("lora", {"precision": "bf16", "optimizer": "sgd"}),
        ("qlora", {"precision": "bf16", "schedule": "cosine"}),
        ("lora", {"precision": "fp32", "optimizer": "adafactor", "schedule": "constant", "warmup_steps": 1}),
    ],
)
def test_formats_and_optimizers(training_run: MakeRun, tuning: str, knobs: dict[str, Any]) -> None:
    run = training_run(tuning=tuning, steps=4, learning_rate=3e-3, **knobs)
    assert attempt(run) == 0
    assert all(math.isfinite(loss) for loss in losses(run).values())
    assert events(run, "warning") == []
    if tuning != "full":
        from safetensors.torch import load_file

        adapter = load_file(run.output_path / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_interrupted_run_continues_exactly(training_run: MakeRun, tuning: str, power_cut: PowerCut) -> None:
    knobs = {"tuning": tuning, "dropout": 0.1 if tuning == "lora" else 0.0, "micro_batch": 4, "accumulation": 2}
    whole, cut = training_run(**knobs), training_run(**knobs)
    assert attempt(whole) == 0
    with power_cut():
        assert attempt(cut) == 1
    assert events(cut, "failure")[0]["message"] == "RuntimeError: power cut"
    assert attempt(cut) == 0
    assert [s["step"] for s in events(cut, "step")] == [1, 2, 3, 3, 4, 5, 6]
    assert losses(cut) == losses(whole)
    assert events(cut, "step")[-1]["tokens"] == events(whole, "step")[-1]["tokens"]
    assert events(cut, "eval")[-1] == events(whole, "eval")[-1]


def test_resume_passes_over_a_damaged_checkpoint(training_run: MakeRun) -> None:
    run = training_run()
    assert attempt(run) == 0
    before = losses(run)
    (run.path / "checkpoints" / "step-000006" / "optimizer.safetensors").write_bytes(b"")
    assert attempt(run) == 0
    assert "step-000006" in events(run, "warning")[0]["what"]
    assert losses(run) == before
    assert [s["step"] for s in events(run, "step")][6:] == [5, 6]


def test_stop_writes_a_checkpoint_and_ends(training_run: MakeRun) -> None:
    run = training_run()
    run.request("stop")
    assert attempt(run) == 0
    assert [s["step"] for s in events(run, "step")] == [1]
    assert [c.step for c in store.find(run.path / "checkpoints")] == [1]
    assert [s["state"] for s in events(run, "state")][-1] == "stopping"
    assert not run.output_path.exists()
    run.withdraw("stop")
    assert attempt(run) == 0
    assert [s["step"] for s in events(run, "step")] == [1, 2, 3, 4, 5, 6]
    assert run.output_path.exists()


def test_a_requested_checkpoint_is_written_once(training_run: MakeRun) -> None:
    run = training_run(recipe={"checkpoint": {"every": 100}})
    run.request("checkpoint")
    assert attempt(run) == 0
    assert [c["step"] for c in events(run, "checkpoint")] == [1, 6]
    assert not run.requested("checkpoint")


def _poison(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    from finetui.engine.trainers.sft import TokenMeanTrainer

    compute = TokenMeanTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **more: Any) -> Any:
        loss = compute(self, *args, **more)
        return loss * math.nan if self.state.global_step in steps else loss

    monkeypatch.setattr(TokenMeanTrainer, "compute_loss", poisoned)


def test_nan_for_some_steps_fails_and_keeps_the_last_good_checkpoint(
    training_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training_run(steps=12)
    _poison(monkeypatch, range(3, 12))
    assert attempt(run) == 1
    failure = events(run, "failure")[0]
    assert failure["cause"] == "nan"
    assert "step 6" in failure["message"]
    assert "learning_rate" in failure["do"]
    assert [c.step for c in store.find(run.path / "checkpoints")] == [1, 2]


def test_one_bad_batch_changes_no_weight(training_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training_run()
    _poison(monkeypatch, range(2, 4))
    assert attempt(run) == 0
    found = losses(run)
    assert [step for step, loss in found.items() if math.isnan(loss)] == [3, 4]
    assert found[5] < found[1]


def test_a_full_disk_fails_with_older_checkpoints_intact(
    training_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training_run()
    sync, syncs = os.fsync, []

    def full(fd: int) -> None:
        syncs.append(fd)
        if store.find(run.path / "checkpoints"):
            raise OSError(28, "No space left on device")
        sync(fd)

    monkeypatch.setattr(store.os, "fsync", full)
    assert attempt(run) == 1
    failure = events(run, "failure")[0]
    assert failure["cause"] == "disk"
    assert "no space is left" in failure["message"]
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-000001"]
    assert store.damage(run.path / "checkpoints" / "step-000001") is None


@pytest.mark.parametrize(
    ("recipe", "knobs", "cause", "said"),
    [
        ({"data": "missing.jsonl"}, {}, "data", "missing.jsonl"),
        ({"model": "/no/such/folder"}, {}, "crash", "no such folder"),
        ({}, {"targets": ["nothing_proj"]}, "crash", "nothing_proj"),
        ({}, {"precision": "fp16"}, "crash", "fp16 needs a GPU"),
    ],
)
def test_what_the_user_can_mend_is_said(
    training_run: MakeRun, recipe: dict[str, Any], knobs: dict[str, Any], cause: str, said: str
) -> None:
    run = training_run(recipe=recipe, **knobs)
    assert attempt(run) == 1
    failure = events(run, "failure")[0]
    assert failure["cause"] == cause
    assert said in f"{failure['where']} {failure['message']}"
    assert failure["do"]


def test_a_checkpoint_without_all_weights_is_refused(
    training_run: MakeRun, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(model_folder("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run = training_run(recipe={"model": str(folder)})
    assert attempt(run) == 1
    assert "up_proj" in events(run, "failure")[0]["message"]


def test_epochs_win_over_estimated_steps(training_run: MakeRun) -> None:
    run = training_run(recipe={"max_steps": None, "checkpoint": {}}, epochs=1.0, steps=17, checkpoint_every=17)
    assert attempt(run) == 0
    assert [s["step"] for s in events(run, "step")] == [1, 2, 3]
    assert "3 steps instead of 17" in events(run, "fallback")[0]["what"]
