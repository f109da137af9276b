"""Preference and reinforcement methods as terms: pairs, references, heads, caches."""

from __future__ import annotations

import dataclasses

import pytest

from finetui.engine.preflight import preflight
from finetui.planner.architecture import Architecture
from finetui.planner.hardware import GIB, Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.memory import kv_cache_bytes, peak_memory
from finetui.planner.methods import METHODS
from finetui.planner.plan import Memory, Plan, Speed
from finetui.planner.recipe import RUNNABLE_METHODS, Recipe
from finetui.planner.settings import Settings
from finetui.planner.solver import make_plan
from finetui.planner.speed import step_speed
from finetui.planner.stacks import STACKS

LLAMA = Architecture.from_config(find_config("meta-llama/Llama-3.1-8B")[1], "Llama-3.1-8B")
H200, STACK = find_gpu("H200"), STACKS["trl"]


def memory(method: str, tuning: str = "lora", **changes) -> Memory:
    return peak_memory(LLAMA, Settings(tuning, 1024, method=method, **changes), STACK, H200)


def speed(method: str, **changes) -> Speed:
    return step_speed(LLAMA, Settings("lora", 1024, method=method, **changes), STACK, H200)


def plan(method: str, **keys) -> Plan:
    if method == "distill":
        keys = {"distillation": {"teacher": "meta-llama/Llama-3.1-8B"}, **keys}
    return make_plan(Recipe.build({"model": "m", "method": method, **keys}), LLAMA, Node(H200))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_planned(method):
    answer = plan(method)
    assert answer.fits
    assert sum(answer.memory.terms.values()) == pytest.approx(answer.memory.device_gib)
    assert sum(answer.speed.terms.values()) == pytest.approx(answer.speed.step_s)
    assert answer.resolved.packing in (False, method == "pretrain")
    assert set(METHODS) == RUNNABLE_METHODS


def test_a_method_that_needs_a_reward_says_so_before_it_starts():
    recipe = Recipe.build({"model": "m", "method": "grpo"})
    local = dataclasses.replace(plan("grpo"), hardware=dataclasses.replace(plan("grpo").hardware, local=True))
    failed = [check for check in preflight(recipe, local) if check.status == "fail"]
    assert any("method grpo needs a reward" in check.detail for check in failed)
    judged = Recipe.build({"model": "m", "method": "grpo", "rewards": ["numeric"]})
    assert not any(check.name == "rewards" and check.status == "fail" for check in preflight(judged, local))


@pytest.mark.parametrize(
    ("method", "world"), [("grpo", 1), ("grpo", 2), ("rloo", 2), ("kto", 1), ("kto", 4), ("ppo", 1)]
)
def test_batches_hold_whole_groups(method, world):
    resolved = make_plan(Recipe.build({"model": "m", "method": method}), LLAMA, Node(H200, world)).resolved
    assert resolved.batch_size % (8 if method in ("grpo", "rloo") else 1) == 0
    assert resolved.micro_batch >= (2 if method == "kto" else 1)
    per_row = {"grpo": 8, "rloo": 8, "ppo": 4}.get(method, 1)
    assert resolved.steps == -(-1000 * per_row // resolved.batch_size)


def test_a_pair_is_two_sequences():
    pair, two = memory("dpo"), memory("sft", micro_batch=2)
    assert pair.allocated_gib == pytest.approx(two.allocated_gib)
    assert memory("reward").allocated_gib < pair.allocated_gib


def test_only_full_fine_tuning_holds_a_copy_of_the_reference():
    assert memory("dpo").terms["weights"] == memory("sft").terms["weights"]
    copy = memory("dpo", "full").terms["weights"] - memory("sft", "full").terms["weights"]
    assert copy == pytest.approx(2 * LLAMA.parameters / GIB)
    assert memory("orpo", "full").terms["weights"] == memory("sft", "full").terms["weights"]


def test_the_reference_takes_a_forward_pass():
    dpo, two = speed("dpo"), speed("sft", micro_batch=2)
    busy = {name: step.step_s - step.terms["launch"] for name, step in (("dpo", dpo), ("two", two))}
    assert busy["dpo"] == pytest.approx(busy["two"] + dpo.terms["reference"], rel=1e-6)
    assert dpo.terms["launch"] >= two.terms["launch"]  # the host starts its kernels too
    assert dpo.terms["reference"] > two.terms["forward"]
    assert speed("kto").terms["reference"] > 2 * speed("kto").terms["forward"]


def test_orpo_holds_logits_where_dpo_goes_through_them_in_tiles():
    orpo, dpo = memory("orpo", micro_batch=4), memory("dpo", micro_batch=4)
    assert orpo.moment == "loss"
    assert orpo.terms["logits"] == pytest.approx(8 * LLAMA.vocab * 8192 / GIB)
    assert dpo.terms["logits"] < orpo.terms["logits"] / 4


def test_generating_needs_a_cache_and_time():
    settings = Settings("lora", 4096, method="grpo", micro_batch=8, accumulation=16)
    cache = 2 * 2 * LLAMA.kv_width * LLAMA.num_layers * 4096 * 8 * 16
    assert kv_cache_bytes(LLAMA, settings) == cache
    found = peak_memory(LLAMA, settings, STACK, H200)
    assert found.moment == "rollout"
    assert found.terms["buffers"] > cache / GIB
    assert "batch_size" in found.lever
    assert step_speed(LLAMA, settings, STACK, H200).terms["rollout"] > 1


def test_a_score_has_no_vocabulary():
    assert memory("reward").terms["logits"] == 0
    assert memory("reward", "full").terms["weights"] < memory("sft", "full").terms["weights"]
