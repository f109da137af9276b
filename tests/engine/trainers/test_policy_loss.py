"""What grpo minimises, beside the formulas of the papers written out completion by completion in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import torch
from torch import Tensor

from finetui.engine.run import Run
from finetui.engine.trainers.rl import GroupTrainer
from finetui.engine.worker import attempt
from finetui.planner.policy_loss import policy_loss
from finetui.planner.rollout import Rollout

from .conftest import events, write_rows

LONGEST, STEPS = 6, 4
Word = dict[str, float]


class Listened:
    """The micro-batches of every update: each completion's words with their probabilities, and the loss that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.updates: list[tuple[list[list[list[Word]]], float]] = []
        self._batch: list[list[list[Word]]] = []
        self._loss, stock = 0.0, GroupTrainer.compute_loss

        def listened(trainer: Any, model: Any, inputs: dict[str, Tensor], *rest: Any, **more: Any) -> Any:
            with torch.no_grad():
                self._batch.append(_words(model, inputs))
            loss = stock(trainer, model, inputs, *rest, **more)
            self._loss += float(loss.detach())
            if len(self._batch) == trainer.args.gradient_accumulation_steps:
                self.updates.append((self._batch, self._loss))
                self._batch, self._loss = [], 0.0
            return loss

        monkeypatch.setattr(GroupTrainer, "compute_loss", listened)


def _words(model: Any, inputs: dict[str, Tensor]) -> list[list[Word]]:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    said = inputs["completion_ids"]
    table = model(input_ids=ids, attention_mask=mask).logits[:, -said.shape[1] - 1 : -1].double().log_softmax(-1)
    now = table.gather(-1, said.unsqueeze(-1)).squeeze(-1)
    figures = {"now": now, "old": inputs["old_per_token_logps"], "entropy": -(table.exp() * table).sum(-1)}
    if "ref_per_token_logps" in inputs:
        figures["ref"] = inputs["ref_per_token_logps"]
    told = []
    for row in range(len(said)):
        length = int(inputs["completion_mask"][row].sum())
        advantage = float(inputs["advantages"][row])
        told.append([{"A": advantage, **{k: float(v[row, t]) for k, v in figures.items()}} for t in range(length)])
    return told


def expected(micro_batches: list[list[list[Word]]], asked: Rollout) -> float:
    """The loss of one update."""
    name = policy_loss(asked).name
    every = [completion for batch in micro_batches for completion in batch]
    count, words = len(every), sum(map(len, every))
    total = 0.0
    for batch in micro_batches:
        sure = sorted(word["entropy"] for completion in batch for word in completion)
        floor = _quantile(sure, 1 - asked.top_entropy)
        share = {"bnpo": 1 / (sum(map(len, batch)) * len(micro_batches)), "dr_grpo": 1 / (count * LONGEST)}
        for completion in batch:
            per = share | dict.fromkeys(("grpo", "sapo"), 1 / (len(completion) * count)) | {"luspo": 1 / count}
            weight = per.get(name, 1 / words)
            kept = [w["entropy"] >= floor or asked.top_entropy == 1 for w in completion]
            losses = [_loss(word, completion, asked) * keep for word, keep in zip(completion, kept, strict=True)]
            if isinstance(asked.beta, float) and asked.beta:
                losses = [
                    loss + asked.beta * _kl(w, completion, asked) for loss, w in zip(losses, completion, strict=True)
                ]
            total += weight * sum(losses)
        chosen = [entropy for entropy in sure if entropy >= floor or asked.top_entropy == 1]
        total -= asked.entropy_bonus * sum(chosen) / len(chosen) / len(micro_batches)
    return total


def _ratio(word: Word, completion: list[Word], asked: Rollout) -> float:
    if policy_loss(asked).importance == "token":
        return math.exp(word["now"] - word["old"])
    return math.exp(sum(w["now"] - w["old"] for w in completion) / len(completion))


def _loss(word: Word, completion: list[Word], asked: Rollout) -> float:
    loss, advantage, ratio = policy_loss(asked), word["A"], _ratio(word, completion, asked)
    drift = sum(w["old"] - w["now"] for w in completion) / len(completion)
    if asked.off_policy_limit is not None and advantage < 0 and drift > asked.off_policy_limit:
        return 0.0
    if loss.name == "cispo":
        return -min(ratio, loss.epsilon_high) * advantage * word["now"]
    if loss.name == "sapo":
        heat = asked.sapo_temperatures[0 if advantage > 0 else 1]
        return -advantage * 4 / heat / (1 + math.exp(-heat * (ratio - 1)))
    if loss.name == "vespo":
        exponent, decay = asked.vespo_weights[:2] if advantage >= 0 else asked.vespo_weights[2:]
        whole = math.exp(sum(w["now"] - w["old"] for w in completion))
        return -math.exp(decay - decay * whole) * whole**exponent * advantage * word["now"]
    near = min(max(ratio, 1 - asked.epsilon), 1 + loss.epsilon_high)
    bounded = ratio if asked.delta is None else min(ratio, asked.delta)
    return -min(bounded * advantage, near * advantage)


def _kl(word: Word, completion: list[Word], asked: Rollout) -> float:
    apart = word["ref"] - word["now"]
    weight = _ratio(word, completion, asked) if asked.unbiased_kl else 1.0
    return weight * (math.exp(apart) - apart - 1)


def _quantile(ordered: list[float], share: float) -> float:
    return float(torch.quantile(torch.tensor(ordered, dtype=torch.float64), share))


VARIANTS: list[dict[str, Any]] = [
    {"epsilon": 0.1, "epsilon_high": 0.15, "delta": 1.2, "mask_truncated": False},
    {"loss": "grpo", "importance": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    {"loss": "bnpo", "entropy_bonus": 0.1, "top_entropy": 0.5},
    {"loss": "dr_grpo", "beta": 0.1, "unbiased_kl": True},
    {"loss": "cispo", "epsilon_high": 1.1},
    {"loss": "sapo", "sapo_temperatures": [2.0, 5.0]},
    {"loss": "luspo", "epsilon": 0.02, "off_policy_limit": 0.01},
    {"loss": "vespo", "vespo_weights": [1.0, 2.0, 4.0, 3.0]},
]


@pytest.mark.parametrize("asked", VARIANTS, ids=lambda asked: asked.get("loss", "dapo"))
def test_losses_are_those_of_the_papers(
    training_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def vowels(completions):\n    return [sum(letter in 'aeiou' for letter in text) for text in completions]\n"
    )
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"colour {i}?"} for i in range(4)])
    rollout = {"max_completion_length": LONGEST, "num_generations": 4, "num_iterations": 2, **asked}
    recipe = {
        "method": "grpo", "data": str(rows), "evaluation": {"holdout": 0.0}, "rewards": [f"{tmp_path}/mine.py:vowels"],
        "rollout": rollout, "checkpoint": {"every": 100},
    }  # fmt: skip
    run = training_run(
        "llama", "full", recipe, method="grpo", micro_batch=8, accumulation=2, steps=STEPS, learning_rate=3e-2,
        max_grad_norm=0.0,
    )  # fmt: skip
    heard = Listened(monkeypatch)
    assert attempt(run) == 0, run.events_path.read_text()
    assert len(heard.updates) == STEPS
    wanted = [expected(batches, run.recipe.rollout) for batches, _ in heard.updates]
    assert [loss for _, loss in heard.updates] == pytest.approx(wanted, rel=2e-4, abs=1e-5)
    words = [word for batches, _ in heard.updates for batch in batches for row in batch for word in row]
    moved = [math.exp(word["now"] - word["old"]) for word in words]
    assert min(moved) < 0.9
    assert max(moved) > 1.2, "the second update on a batch is far enough from the first to be bounded"
    stock = Rollout(num_generations=4, num_iterations=2)
    other = [expected(batches, stock) for batches, _ in heard.updates]
    assert max(abs(a - b) for a, b in zip(other, wanted, strict=True)) > 1e-3, "the options do change the loss"
    assert events(run, "warning") == []


def test_rewards_that_are_normalised_by_themselves_weigh_the_same(
    training_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward in thousands drowns one in ones in their sum, but not where each is normalised before (GDPO)."""
    (tmp_path / "mine.py").write_text(
        "def much(completions):\n    return [1000.0 * len(text) for text in completions]\n"
        "def little(completions):\n    return [float('e' in text) for text in completions]\n"
    )
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"colour {i}?"} for i in range(4)])
    advantages: list[list[float]] = []
    stock = GroupTrainer.compute_loss

    def listened(trainer: Any, model: Any, inputs: dict[str, Tensor], *rest: Any, **more: Any) -> Any:
        advantages.append(inputs["advantages"].tolist())
        return stock(trainer, model, inputs, *rest, **more)

    monkeypatch.setattr(GroupTrainer, "compute_loss", listened)
    for separate in (False, True):
        recipe = {
            "method": "grpo", "data": str(rows), "evaluation": {"holdout": 0.0}, "checkpoint": {"every": 100},
            "rewards": [f"{tmp_path}/mine.py:{name}" for name in ("much", "little")],
            "rollout": {"max_completion_length": LONGEST, "num_generations": 8, "separate_rewards": separate},
        }  # fmt: skip
        run = training_run("llama", "full", recipe, method="grpo", micro_batch=8, accumulation=1, steps=1)
        assert attempt(run) == 0, run.events_path.read_text()
    summed, apart = (torch.tensor(values, dtype=torch.float64) for values in advantages)
    assert len(summed) == len(apart) == 8
    assert not torch.allclose(summed, apart, atol=1e-2)
    assert abs(float(apart.mean())) < 1e-5
    assert float(apart.std()) == pytest.approx(1.0, abs=1e-2)
