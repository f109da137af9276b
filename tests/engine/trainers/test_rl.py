"""Learning from rewards: what is learned is the known optimum, figures are told, and a resumed run goes on exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import torch

from finetui.engine.run import Run
from finetui.engine.trainers.order import RolloutOrder
from finetui.engine.trainers.rl import RolloutTrainer
from finetui.engine.worker import attempt

from .conftest import events, losses, write_rows

MakeRun = Callable[..., Run]
PowerCut = Callable[..., AbstractContextManager[None]]
MINE = """
def red(completions, **_):
    return [float(text.strip().startswith("r")) for text in completions]

def length(completions, answer, **_):
    return [len(text) / 10 + (text == right) for text, right in zip(completions, answer)]

def broken(completions, **_):
    raise ValueError("no")
"""


@pytest.fixture
def rollout_run(training_run: MakeRun, tmp_path: Path) -> MakeRun:
    """Makes a run over twelve prompts with rewards of MINE; a step trains on micro_batch x accumulation completions."""
    (tmp_path / "mine.py").write_text(MINE)
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"colour {i}?", "answer": "red"} for i in range(12)])

    def make(method: str, tuning: str = "lora", recipe: dict[str, Any] | None = None, **plan: Any) -> Run:
        asked: dict[str, Any] = {
            "method": method, "data": str(rows), "evaluation": {"holdout": 0.2, "every": 4},
            "rewards": [f"{tmp_path}/mine.py:length"],
            "rollout": {"max_completion_length": 6, "num_generations": 4},
        }  # fmt: skip
        knobs = {"method": method, "micro_batch": 4, "accumulation": 2, "learning_rate": 1e-3}
        return training_run("llama", tuning, {**asked, **(recipe or {})}, **{**knobs, **plan})

    return make


def figures(run: Run, name: str) -> list[float]:
    """One figure of every step that has it."""
    return [event["values"][name] for event in events(run, "metrics") if name in event["values"]]


def bandit(rollout_run: MakeRun, tmp_path: Path, method: str, steps: int, **options: Any) -> Run:
    """One word is said, and rewarded if it begins with an r."""
    group = {} if method == "ppo" else {"num_generations": 16}
    run = rollout_run(
        method,
        "full",
        {
            "rewards": [f"{tmp_path}/mine.py:red"],
            "rollout": {"max_completion_length": 1, **group, **options.pop("rollout", {})},
            "evaluation": {"holdout": 0.0},
            "checkpoint": {"every": 1000},
        },
        steps=steps,
        accumulation=1,
        schedule="constant",
        **{"micro_batch": 64, "learning_rate": 1e-2, **options},
    )
    assert attempt(run) == 0, run.events_path.read_text()
    return run


def chance_of_red(folder: str | Path, prompts: int = 12) -> float:
    """Mean probability of a rewarded word, from the logits themselves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    words = torch.tensor([tokenizer.decode([i], skip_special_tokens=True).strip().startswith("r") for i in range(320)])
    told = []
    for i in range(prompts):
        ids = torch.tensor([tokenizer(f"colour {i}?")["input_ids"]])
        with torch.no_grad():
            told.append(model(ids).logits[0, -1].softmax(-1)[words].sum().item())
    return sum(told) / len(told)


@pytest.mark.parametrize(
    ("method", "steps", "rollout"),
    [
        ("grpo", 40, {}),
        ("rloo", 40, {"beta": 0.0}),
        ("ppo", 80, {"beta": 0.0, "value_learning_rate": 1e-2}),
    ],
)
def test_the_rewarded_word_becomes_certain(
    rollout_run: MakeRun, tmp_path: Path, method: str, steps: int, rollout: dict[str, Any]
) -> None:
    run = bandit(rollout_run, tmp_path, method, steps, rollout=rollout)
    assert chance_of_red(run.recipe.model) < 0.05
    assert chance_of_red(run.output_path) > 0.99
    assert figures(run, "reward")[-1] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "steps", "rollout"), [("ppo", 240, {"value_learning_rate": 1e-2}), ("rloo", 80, {})]
)
def test_with_kl_the_optimum_is_the_tilted_reference(
    rollout_run: MakeRun, tmp_path: Path, method: str, steps: int, rollout: dict[str, Any]
) -> None:
    """The policy that maximises E[r] - beta KL is the reference times e^(r / beta), normalised: p' is known from p."""
    beta = 0.25
    run = bandit(
        rollout_run, tmp_path, method, steps, rollout={**rollout, "beta": beta}, micro_batch=256, learning_rate=5e-3
    )
    before = chance_of_red(run.recipe.model)
    lifted = before * math.exp(1 / beta)
    expected = lifted / (1 - before + lifted)
    late = figures(run, "reward")[-max(1, len(figures(run, "reward")) // 3) :]
    assert 0.3 < expected < 0.7
    assert sum(late) / len(late) == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize(("method", "tuning"), [("grpo", "lora"), ("grpo", "qlora"), ("rloo", "full"), ("ppo", "lora")])
def test_figures_and_completions_are_told(rollout_run: MakeRun, method: str, tuning: str) -> None:
    run = rollout_run(method, tuning, {"rollout": {"max_completion_length": 6, "num_generations": 4, "beta": 0.1}})
    assert attempt(run) == 0, run.events_path.read_text()
    told = [event["values"] for event in events(run, "metrics")]
    training = [values for values in told if "reward" in values]
    wanted = {"reward", "rewards/length/mean", "rewards/length/unscored", "kl", "entropy", "completions/mean_length"}
    assert wanted <= set().union(*training)
    assert all(math.isfinite(value) for values in told for value in values.values())
    held_out = [values for values in told if "eval_reward" in values]
    assert len(held_out) == 3  # before the first step, after four, and at the end
    assert "eval_rewards/length/mean" in held_out[0]
    shown = [sample for sample in events(run, "sample") if sample["reward"] is not None]
    assert {1, 5} <= {sample["step"] for sample in shown}  # ppo's second batch of completions is that of step 5
    assert all(sample["prompt"].startswith("colour") for sample in shown)
    assert events(run, "warning") == []
    files = {path.name for path in run.output_path.iterdir()}
    assert "value_head.pt" not in files
    assert ("adapter_model.safetensors" in files) == (tuning != "full")
    assert not (run.output_path / "ref").exists()


@pytest.mark.parametrize(
    ("method", "tuning", "rollout"),
    [
        ("grpo", "lora", {"beta": 0.1}),
        ("grpo", "full", {"num_iterations": 2}),
        ("rloo", "lora", {}),
        ("ppo", "lora", {"num_iterations": 3, "kl_target": 0.01}),
        ("ppo", "full", {"num_iterations": 4}),
    ],
)
def test_an_interrupted_run_continues_exactly(
    rollout_run: MakeRun, power_cut: PowerCut, method: str, tuning: str, rollout: dict[str, Any]
) -> None:
    recipe = {"rollout": {"max_completion_length": 6, "num_generations": 4, **rollout}}
    whole, cut = (rollout_run(method, tuning, recipe) for _ in range(2))
    assert attempt(whole) == 0, whole.events_path.read_text()
    with power_cut():
        assert attempt(cut) == 1
    assert attempt(cut) == 0
    assert [step["step"] for step in events(cut, "step")] == [1, 2, 3, 3, 4, 5, 6]
    assert losses(cut) == losses(whole)
    by_step = [
        {event["step"]: event["values"] for event in events(run, "metrics") if "eval_reward" not in event["values"]}
        for run in (cut, whole)
    ]
    assert by_step[0] == by_step[1]
    assert [e["grad_norm"] for e in events(cut, "step")][-3:] == [e["grad_norm"] for e in events(whole, "step")][-3:]


def test_a_broken_reward_is_named_and_ends_the_run(rollout_run: MakeRun, tmp_path: Path) -> None:
    run = rollout_run("grpo", recipe={"rewards": [f"{tmp_path}/mine.py:broken"]})
    assert attempt(run) == 1
    (failure,) = events(run, "failure")
    assert failure["cause"] == "data"
    assert "the reward broken has scored nothing for 3 batches in a row" in failure["message"]
    assert "ValueError: no" in failure["message"]
    warned = [warning["what"] for warning in events(run, "warning")]
    assert "the reward broken gave no score for one completion: ValueError: no (mine.py:9)" in warned


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"rewards": []}, "needs a reward"),
        ({"rewards": ["python-tests"]}, "column 'tests'"),
        ({"rollout": {"num_generations": 3, "max_completion_length": 4}}, "no whole groups of 3"),
        (
            {"rollout": {"num_generations": 4, "max_completion_length": 4, "engine": "vllm"}},
            "vLLM can't generate: it is not installed",
        ),
        ({"rollout": {"num_generations": 4, "max_completion_length": 126}}, "no prompt leaves room"),
    ],
)
def test_what_the_user_can_mend_is_said(rollout_run: MakeRun, recipe: dict[str, Any], said: str) -> None:
    run = rollout_run("grpo", recipe=recipe)
    assert attempt(run) == 1
    assert said in events(run, "failure")[0]["message"]


def test_the_order_of_prompts() -> None:
    whole = RolloutOrder(rows=5, steps=4, micro_batch=4, accumulation=2, seed=3, generations=2, iterations=2)
    batches = list(whole)
    assert len(batches) == len(whole) == 8
    assert batches[0] == batches[1] == batches[2] == batches[3] != batches[4]
    prompts = [*batches[0][::2], *batches[4][::2]]
    assert sorted(prompts[:5]) == list(range(5))
    assert batches[0][::2] == batches[0][1::2]
    ranks = [
        list(RolloutOrder(5, 4, 2, 2, rank=rank, world=2, seed=3, generations=2, iterations=2)) for rank in range(2)
    ]
    assert [*ranks[0][0], *ranks[1][0]] == batches[0]
    assert whole.passes(4) == 8 / 5


@pytest.mark.parametrize(("method", "tuning"), [("ppo", "full"), ("grpo", "lora")])
def test_what_was_rewarded_best_is_the_result_also_of_a_resumed_run(
    rollout_run: MakeRun, power_cut: PowerCut, monkeypatch: pytest.MonkeyPatch, method: str, tuning: str
) -> None:
    from safetensors.torch import load_file

    rewards = {0: 9.0, 1: 1.0, 2: 5.0, 3: 4.0, 4: 3.0}
    monkeypatch.setattr(RolloutTrainer, "measure", lambda self: {"reward": rewards[self.state.global_step]})
    run = rollout_run(
        method, tuning, {"evaluation": {"holdout": 0.2, "every": 1, "keep_best": True}}, steps=4, eval_every=1
    )
    with power_cut(3):
        assert attempt(run) == 1
    assert attempt(run) == 0
    assert json.loads((run.output_path / "training.json").read_text()) == {"step": 2, "held_out_loss": -5.0}
    kept = [name for file in run.output_path.glob("*.safetensors") for name in load_file(file)]
    assert kept
    assert not [name for name in kept if "value_head" in name]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_adapters_in_fp32_on_a_base_in_16_bits(rollout_run: MakeRun, device: str) -> None:
    rollout = {"beta": 0.05, "num_generations": 4, "max_completion_length": 6}
    recipe = {"rollout": rollout, "evaluation": {"holdout": 0.0}}
    run = rollout_run("grpo", "lora", recipe, steps=1, precision="bf16", device=device)
    assert attempt(run) == 0, run.events_path.read_text()
