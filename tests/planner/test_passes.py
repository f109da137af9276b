"""What a method holds and computes beside its trained passes, for finetui and for TRL's trainers."""

from __future__ import annotations

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.passes import Passes, passes_of, usual
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan

MODEL = "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("method", "tuning", "keys", "expected"),
    [
        ("sft", "full", {}, Passes()),
        ("dpo", "lora", {"epochs": 1}, Passes(forwards=1)),
        ("dpo", "lora", {"epochs": 2}, Passes(once=True)),
        ("dpo", "full", {}, Passes(once=True)),
        ("dpo", "full", {"preference": {"reference": "live"}}, Passes(copy=True, forwards=1)),
        ("kto", "full", {}, Passes(copy=True, forwards=3)),
        ("kto", "lora", {}, Passes(forwards=3)),
        ("kto", "lora", {"preference": {"loss": "bco"}}, Passes(forwards=1)),
        ("orpo", "full", {}, Passes()),
        ("reward", "lora", {}, Passes()),
        ("grpo", "full", {}, Passes(completion=512)),
        ("grpo", "full", {"rollout": {"beta": 0.1}}, Passes(copy=True, forwards=1, completion=512)),
        ("grpo", "lora", {"rollout": {"beta": 0.1, "num_iterations": 2, "max_completion_length": 100}},
         Passes(forwards=1, completion=100, updates=2)),
        ("rloo", "lora", {}, Passes(forwards=1, completion=512)),
        ("ppo", "full", {}, Passes(copy=True, forwards=0.5, completion=512, updates=4)),
        ("ppo", "full", {"rollout": {"beta": 0}}, Passes(forwards=0.25, completion=512, updates=4)),
    ],
)  # fmt: skip
def test_of_a_recipe(method, tuning, keys, expected):
    recipe = Recipe.build({"model": MODEL, "method": method, "tuning": tuning, **keys})
    assert passes_of(recipe, 2048) == expected


def test_trl_holds_a_copy_of_a_full_model_and_answers_within_its_length():
    assert usual("dpo", full=True, sequence_length=2048) == Passes(copy=True, forwards=1)
    assert usual("dpo", full=False, sequence_length=2048) == Passes(forwards=1)
    assert usual("grpo", full=True, sequence_length=256) == Passes(completion=128)


def _plan(framework: str = "finetui", **keys):
    recipe = Recipe.build({"model": MODEL, "tuning": "full", "hardware": {"precision": "bf16"}, **keys})
    architecture = Architecture.from_config(find_config(MODEL)[1], MODEL)
    return make_plan(recipe, architecture, Node(find_gpu("H100")), framework=framework)


def test_a_reference_computed_before_the_first_step_costs_time_once_and_no_memory():
    once, live = _plan(method="dpo"), _plan(method="dpo", preference={"reference": "live"})
    theirs = _plan("trl", method="dpo")
    one_model = 2 * 596_049_920 / 2**30
    assert live.memory.terms["weights"] - once.memory.terms["weights"] == pytest.approx(one_model, rel=0.01)
    assert theirs.memory.terms["weights"] == live.memory.terms["weights"]
    assert "reference" not in once.speed.terms
    steps_s = once.resolved.steps * once.speed.step_s
    beside = once.time_s - steps_s - (live.time_s - live.resolved.steps * live.speed.step_s)
    assert beside == pytest.approx(steps_s / 3, rel=0.05)


def test_shorter_answers_and_more_updates_on_them_cost_less():
    full = _plan(method="grpo").speed.terms["rollout"]
    short = _plan(method="grpo", rollout={"max_completion_length": 128}).speed.terms["rollout"]
    again = _plan(method="grpo", rollout={"num_iterations": 2}).speed.terms["rollout"]
    assert short == pytest.approx(full / 4)
    assert again == pytest.approx(full / 2)
