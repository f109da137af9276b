"""The formulas of a plan: their parts are named, and add up to its figures."""

from __future__ import annotations

from itertools import product

import pytest

from finetui.engine.planning import explain
from finetui.planner.architecture import Architecture
from finetui.planner.calibration import Finished, size_of
from finetui.planner.errors import UserError
from finetui.planner.hardware import node_for
from finetui.planner.hub import find_config
from finetui.planner.recipe import Recipe
from finetui.planner.terms import explain_terms

MODELS = ("Qwen/Qwen3-8B", "meta-llama/Llama-3.2-1B", "openai/gpt-oss-20b")

POLICIES = ("none", "full")


@pytest.mark.parametrize("framework", ["finetui", "trl"])
@pytest.mark.parametrize(("model", "tuning"), product(MODELS, ("full", "lora", "qlora", "lora-fp8", "ia3")))
def test_the_parts_add_up_and_each_has_a_name(model: str, tuning: str, framework: str) -> None:
    planned = 0
    for method, gpu, count, policy in product(("sft", "grpo"), ("RTX-4090", "H100-SXM"), (1, 4), POLICIES):
        hardware = {"gpu": gpu, "gpus": count, "checkpointing": policy}
        try:
            recipe = Recipe.build({"model": model, "tuning": tuning, "method": method, "hardware": hardware})
            plan, terms = explain(recipe, framework=framework)
        except UserError:  # not every combination there is can be
            continue
        planned += 1
        assert set(plan.memory.terms) <= set(terms)
        for name, term in terms.items():
            assert sum(part.amount for part in term.parts) == pytest.approx(term.amount, rel=3e-3, abs=2e-3), name
            assert "other" not in {part.what for part in term.parts}, (name, term)
            assert all(part.amount > -1e-6 for part in term.parts), (name, term)
        for name, gib in plan.memory.terms.items():
            assert terms[name].amount == gib
        assert terms["speed"].amount == plan.speed.step_s
        assert terms["time"].amount == plan.time_s
        assert terms["cost"].amount == plan.cost.usd
    assert planned or tuning in ("lora-fp8", "ia3")


def test_the_numbers_are_those_of_the_model() -> None:
    recipe = Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "qlora", "hardware": {"gpu": "RTX-4090"}})
    plan, terms = explain(recipe)
    linear, rest = terms["weights"].parts
    assert linear.sum == "6,945.8 M × 0.5159 bytes"
    assert linear.amount == pytest.approx(6_945_767_424 * (0.5 + 1 / 64 + 4 / (64 * 256)) / 2**30)
    assert rest.sum == "1,245.0 M × 2 bytes"
    assert terms["adapter"].parts[0].sum == f"{plan.model.trainable / 1e6:,.1f} M × 4 bytes"
    assert f"{plan.resolved.steps:,} steps" in terms["time"].parts[0].sum


def test_what_finished_runs_taught_is_a_part() -> None:
    recipe = Recipe.build({"model": "Qwen/Qwen3-8B", "tuning": "qlora", "hardware": {"gpu": "RTX-4090"}})
    name, config, _ = find_config(recipe.model)
    architecture, node = Architecture.from_config(config, name), node_for(recipe.hardware)
    kind = (node.gpu.name, architecture.family, "qlora", size_of(architecture.parameters), "finetui")
    runs = [Finished(*kind, memory=1.1, speed=0.8) for _ in range(5)]
    plan, terms = explain_terms(recipe, architecture, node, finished=runs)
    assert plan.basis == "calibrated"
    taught = {
        name: part.amount for name, term in terms.items() for part in term.parts if "measured beside" in part.what
    }
    assert taught["activations"] == pytest.approx(0.1 / 1.1 * terms["activations"].amount, rel=0.02)
    assert taught["forward"] == pytest.approx(0.2 * terms["forward"].amount, rel=0.02)
    assert "weights" not in taught
