"""The options of methods: what acts on what, and what is left open."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetui.planner.errors import RecipeError
from finetui.planner.objective import LOSSES, objective
from finetui.planner.policy_loss import PolicyLoss, policy_loss
from finetui.planner.recipe import Recipe
from finetui.planner.rollout import column_of, rollouts


def recipe(method: str, **keys) -> Recipe:
    return Recipe.build({"model": "m", "method": method, **keys})


def test_every_loss_of_trl_is_known():
    trl = pytest.importorskip("trl")
    said = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(f"`'{loss}'`" in said or f"'{loss}'" in said for loss in LOSSES["dpo"])


def test_open_options_get_the_papers_values():
    assert objective(recipe("dpo")).losses == {"sigmoid": 1.0}
    assert objective(recipe("dpo")).beta == 0.1
    assert (objective(recipe("simpo")).beta, objective(recipe("simpo")).margin) == (2.0, 1.0)
    assert (objective(recipe("cpo")).nll_weight, objective(recipe("simpo")).nll_weight) == (1.0, 0.0)
    assert objective(recipe("dpo", preference={"loss": "exo_pair"})).label_smoothing == 1e-3
    several = objective(recipe("dpo", preference={"loss": {"sigmoid": 0.8, "sft": 0.2}}))
    assert several.losses == {"sigmoid": 0.8, "sft": 0.2}


@pytest.mark.parametrize(
    ("method", "keys", "reference"),
    [
        ("dpo", {}, "adapter-off"),
        ("dpo", {"epochs": 2}, "precomputed"),
        ("dpo", {"tuning": "full"}, "precomputed"),
        ("ipo", {"tuning": "full", "preference": {"reference": "live"}}, "copy"),
        ("kto", {"epochs": 3}, "adapter-off"),
        ("kto", {"tuning": "full"}, "copy"),
        ("orpo", {"epochs": 3}, "none"),
    ],
)
def test_whose_word_the_reference_is(method, keys, reference):
    assert objective(recipe(method, **keys)).reference == reference


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("sft", {"preference": {"beta": 0.1}}, "preference has no effect when method is sft"),
        ("orpo", {"preference": {"margin": 1.0}}, "preference.margin has no effect when method is orpo"),
        ("dpo", {"preference": {"loss": "kto"}}, "method dpo has no loss kto"),
        ("cpo", {"preference": {"loss": {"sigmoid": 1}}}, "several losses need method dpo"),
        ("dpo", {"preference": {"loss": {}}}, "at least one name"),
        ("dpo", {"preference": {"beta": 0}}, "beta must be above 0"),
        ("dpo", {"preference": {"label_smoothing": 0.1}}, "acts on the losses aot"),
        ("dpo", {"preference": {"losss": "sigmoid"}}, "losss"),
        ("kto", {"preference": {"reference": "precomputed"}}, "kto can't precompute"),
        ("kto", {"micro_batch": 1}, "micro_batch of 2 or more"),
        ("dpo", {"rollout": {"beta": 0.1}}, "rollout has no effect when method is dpo"),
        ("sft", {"rewards": ["numeric"]}, "rewards has no effect when method is sft"),
        ("grpo", {"rewards": ["nummeric"]}, "there is no reward 'nummeric'"),
        ("grpo", {"rewards": ["./a.py"]}, "path.py:function"),
        ("grpo", {"rewards": [{"function": "numeric", "pattern": "x"}]}, "pattern has no effect on the reward numeric"),
        ("grpo", {"rewards": [{"function": "a.py:f", "tolerance": 1}]}, "tolerance has no effect"),
        ("grpo", {"rewards": ["regex"]}, "needs a pattern"),
        ("grpo", {"rewards": [{"function": "regex", "pattern": "("}]}, "pattern of the reward regex is wrong"),
        ("grpo", {"rewards": ["a.py:f", "b.py:f"]}, "two rewards are called f"),
        ("grpo", {"rollout": {"gae_lambda": 0.9}}, "gae_lambda has no effect when method is grpo"),
        ("ppo", {"rollout": {"loss": "grpo"}}, "rollout.loss has no effect when method is ppo"),
        ("grpo", {"rollout": {"num_generations": 1}}, "2 or more"),
        ("rloo", {"rollout": {"delta": 3.0}}, "rollout.delta has no effect when method is rloo"),
        ("grpo", {"rollout": {"delta": 3.0}}, "delta has no effect with one update per batch"),
        ("grpo", {"rollout": {"delta": 1.2, "num_iterations": 2}}, "Set it above 1.2"),
        ("grpo", {"rollout": {"loss": "cispo", "epsilon": 0.1}}, "epsilon has no effect on loss cispo"),
        ("grpo", {"rollout": {"loss": "sapo", "epsilon_high": 0.3}}, "epsilon_high has no effect on loss sapo"),
        ("grpo", {"rollout": {"sapo_temperatures": [1, 2]}}, "for sapo"),
        ("grpo", {"rollout": {"loss": "sapo", "sapo_temperatures": [1]}}, "sapo_temperatures"),
        ("grpo", {"rollout": {"loss": "vespo", "importance": "sequence"}}, "weighs whole completions by itself"),
        ("grpo", {"rollout": {"loss": "luspo", "importance": "token"}}, "luspo compares whole completions"),
        ("grpo", {"rollout": {"unbiased_kl": True, "num_iterations": 2}}, "no effect when beta is 0"),
        ("grpo", {"rollout": {"off_policy_limit": 0.1, "engine": "transformers"}}, "off_policy_limit has no effect"),
        ("grpo", {"rollout": {"separate_rewards": True, "scale_rewards": "batch"}}, "scale_rewards has no effect"),
        ("grpo", {"rollout": {"loss": "gspo"}}, "rollout.loss"),
        ("grpo", {"batch_size": 12}, "no multiple of the 8 completions"),
    ],
)
def test_what_has_no_effect_is_refused(method, keys, said):
    with pytest.raises(RecipeError, match=said.replace("(", "\\(").replace(".", "\\.")):
        recipe(method, **keys)


@pytest.mark.parametrize(
    ("asked", "settled"),
    [
        ({}, PolicyLoss("dapo", "token", 0.2)),
        ({"importance": "sequence", "epsilon": 3e-4}, PolicyLoss("grpo", "sequence", 3e-4)),
        ({"importance": "sequence", "loss": "dapo"}, PolicyLoss("dapo", "sequence", 0.2)),
        ({"loss": "cispo"}, PolicyLoss("cispo", "token", 5.0)),
        ({"loss": "cispo", "epsilon_high": 3.0}, PolicyLoss("cispo", "token", 3.0)),
        ({"loss": "luspo", "epsilon_high": 0.3}, PolicyLoss("luspo", "sequence", 0.3)),
    ],
)
def test_what_grpo_minimises_is_settled(asked, settled):
    assert policy_loss(recipe("grpo", rollout=asked).rollout) == settled


def test_rollouts_are_settled():
    assert rollouts(recipe("grpo"), 2048).num_generations == 8
    assert rollouts(recipe("grpo"), 300).max_completion_length == 150
    settled = rollouts(recipe("ppo"), 2048)
    assert (settled.num_generations, settled.num_iterations, settled.beta) == (1, 4, 0.05)
    asked = recipe("rloo", rollout={"num_generations": 2, "max_completion_length": 9, "beta": 0})
    assert rollouts(asked, 2048).max_completion_length == 9
    assert rollouts(asked, 2048).beta == 0


def test_paths_of_rewards_are_those_beside_the_recipe(tmp_path: Path):
    text = "model: m\nmethod: grpo\nrewards: [numeric, ./mine.py:score, {function: more/of.py:it, weight: 2}]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    rewards = Recipe.load(tmp_path / "recipe.yaml").rewards
    assert [reward.function for reward in rewards] == [
        "numeric",
        f"{tmp_path}/mine.py:score",
        f"{tmp_path}/more/of.py:it",
    ]
    assert [reward.name for reward in rewards] == ["numeric", "score", "it"]
    assert column_of(rewards[0]) == "answer"
    assert Recipe.build({"model": "m", "method": "grpo", "rewards": "numeric"}).rewards[0].weight == 1.0
