"""CUDA graphs where the recipe leaves them open: only where they are safe and pay, and with the reason."""

from __future__ import annotations

from functools import cache

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.errors import HardwareError
from finetui.planner.hardware import Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.plan import Plan, Workload
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan

SMALL, LARGE = "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B"
ROWS = Workload(examples=20_000, tokens=20_000 * 300, longest=2000, basis="counted")


@cache
def architecture(name: str) -> Architecture:
    return Architecture.from_config(find_config(name)[1], name)


def plan(model: str = SMALL, gpu: str = "H200", count: int = 1, workload: Workload = ROWS, **keys) -> Plan:
    keys = {"tuning": "lora", "sequence_length": 2048, "batch_size": 4, "micro_batch": 1, "packing": True} | keys
    return make_plan(Recipe.build({"model": model, **keys}), architecture(model), Node(find_gpu(gpu), count), workload)


def test_a_small_model_on_packed_rows_is_replayed_and_the_plan_says_why():
    chosen, launched = plan(), plan(hardware={"graphs": False})
    assert chosen.resolved.graphs
    assert not launched.resolved.graphs
    assert chosen.speed.step_s < launched.speed.step_s
    assert chosen.memory.device_gib >= launched.memory.device_gib
    (reason,) = [reason for reason in chosen.reasons if reason.setting == "graphs"]
    assert "host" in reason.why
    assert not [reason for reason in launched.reasons if reason.setting == "graphs"]


@pytest.mark.parametrize(
    "keys",
    [
        {"model": LARGE, "micro_batch": 4},  # the GPU is the slower one
        {"packing": False},
        {"workload": Workload(examples=100, tokens=100 * 300, longest=2000, basis="counted")},  # too few steps
        {"max_steps": 20},
        {"count": 2, "hardware": {"gpus": 2}},
        {"tuning": "full"},
        {"tuning": {"type": "lora", "dropout": 0.1}},
        {"tuning": "dora"},
        {"method": "dpo", "packing": False},
        {"neftune_alpha": 5.0},
        {"loss": "eaft"},
        {"hardware": {"kernels": "off"}},
        {"hardware": {"precision": "fp16"}},
        {"hardware": {"checkpointing": "offload"}},
    ],
)
def test_where_graphs_are_unsafe_or_do_not_pay_the_planner_leaves_them(keys):
    assert not plan(**keys).resolved.graphs


def test_a_tenth_of_the_memory_stays_free(monkeypatch):
    from finetui.planner import replay

    monkeypatch.setattr(replay, "FREE", 1 - 0.5 * plan().memory.device_gib / find_gpu("H200").memory_gib)
    assert not plan().resolved.graphs


def test_who_asks_for_graphs_gets_them_or_an_error():
    assert plan(LARGE, hardware={"graphs": True}, packing=False).resolved.graphs
    with pytest.raises(HardwareError):
        plan(method="dpo", packing=False, hardware={"graphs": True})
    with pytest.raises(HardwareError, match="on one GPU alone"):
        plan(count=2, hardware={"graphs": True})
