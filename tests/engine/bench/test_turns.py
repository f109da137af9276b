"""Programs in turns: what each is asked to do, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from finetui.engine.bench import shapes
from finetui.engine.bench.task import SETTLE, Task
from finetui.engine.bench.turns import facts, measure, tasks_of


def test_turns_begin_after_everything_has_settled() -> None:
    task = Task("m", rounds=2, turn=3)
    assert task.steps == SETTLE + 6
    begins = {step: turn for step in range(task.steps + 1) if (turn := task.turn_of(step)) is not None}
    assert begins == {0: 0, SETTLE: 1, SETTLE + 3: 2, SETTLE + 6: 3}
    assert Task.from_json(task.to_json()) == task


def test_programs_that_are_not_installed_are_left_out_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "unsloth" else object())
    tasks = tasks_of(Task("m"), ["finetui", "unsloth", "trl"], ["none", "offload"], told.append)
    assert [(task.arm, task.mode) for task in tasks] == [("finetui", "none"), ("trl", "none"), ("finetui", "offload")]
    assert told == ["unsloth is not installed here"]


@pytest.mark.slow
def test_ours_and_trl_take_turns_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    monkeypatch.setitem(shapes.SHAPES, "toy", toy)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shapes.make("toy", tmp_path / "toy")
    first = Task(str(tmp_path / "toy"), sequence_length=32, micro_batch=2, rounds=2, turn=1)
    told: list[str] = []
    results = measure(tasks_of(first, ["finetui", "trl"], ["none"], told.append), told.append, timeout_s=120)
    assert [result["arm"] for result in results] == ["finetui", "trl"]
    for result in results:
        assert "failed" not in result, told
        assert len(result["step_s"]) == SETTLE + 2
        assert len(result["rounds_tokens_per_s"]) == 2
        assert result["to_first_step_s"] > result["first_step_s"] > 0
        assert result["loss"] == pytest.approx([5.56] * 3, abs=0.15), "ln 259: random weights know nothing"
        assert all(norm > 0 for norm in result["grad_norm"])


def test_facts_name_command_date_device_and_versions() -> None:
    told = facts("finetui bench engine")
    assert told["command"] == "finetui bench engine"
    assert {"torch", "transformers"} <= told["versions"].keys()
