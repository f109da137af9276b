"""Where a plan does not fit, each change that it names is applied to the recipe, and then it does fit."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import Node, cpu_node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan

MODELS = ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-70B", "mistralai/Mixtral-8x7B-v0.1", "google/gemma-3-4b-pt")


@cache
def architecture(name: str) -> Architecture:
    return Architecture.from_config(find_config(name)[1], name)


def planned(keys: dict[str, Any], gpu: str, count: int) -> Plan:
    return make_plan(Recipe.build(keys), architecture(keys["model"]), Node(find_gpu(gpu), count))


def applied(keys: dict[str, Any], warning: str, gpu: str, count: int) -> tuple[Plan, float]:
    """The plan of the recipe with the change made, and the GiB that the warning promised."""
    change, promised = re.fullmatch(r"(.*) would fit: ([\d.]+) of .*", warning).groups()
    keys = {**keys, **{name: dict(keys.get(name, {})) for name in ("hardware", "optimizer", "rollout")}}
    for part in re.split(r" with | and ", change):
        name, value = part.split(": ")
        section, _, field = name.rpartition(".")
        if name == "hardware.gpu":
            gpu, count = value, 1 if "gpus" in change or "gpus" not in keys["hardware"] else count
            continue
        if name == "hardware.gpus" and "hardware.gpu:" not in change:
            count = int(value)
        target = keys[section] if section else keys
        target[field or name] = int(value) if value.isdigit() else value
    return planned(keys, gpu, count), float(promised)


CASES = [
    ("RTX-4090", 1, {"model": "Qwen/Qwen3-8B", "tuning": "full"}),
    ("A100", 8, {"model": "meta-llama/Llama-3.1-70B", "tuning": "lora", "hardware": {"gpus": 8, "strategy": "ddp"}}),
    ("A100-40GB", 2, {"model": "meta-llama/Llama-3.1-70B", "tuning": "lora",
                      "hardware": {"gpus": 2, "strategy": "fsdp"}}),
    ("RTX-3090", 1, {"model": "Qwen/Qwen3-8B", "tuning": "lora", "micro_batch": 4, "batch_size": 16,
                     "sequence_length": 8192, "hardware": {"checkpointing": "none"}}),
    ("A100", 1, {"model": "Qwen/Qwen3-8B", "tuning": "full", "optimizer": {"name": "adamw"},
                 "hardware": {"precision": "bf16-mixed"}}),
    ("RTX-4090", 1, {"model": "Qwen/Qwen3-8B", "tuning": "full", "method": "dpo", "sequence_length": 4096}),
    ("RTX-4090", 1, {"model": "Qwen/Qwen3-8B", "tuning": "lora", "method": "kto", "micro_batch": 8, "batch_size": 16,
                     "sequence_length": 4096}),
    ("RTX-4090", 1, {"model": "google/gemma-3-4b-pt", "tuning": "full", "method": "grpo", "rewards": ["numeric"],
                     "rollout": {"engine": "vllm"}, "optimizer": {"name": "adamw-8bit"}}),
    ("RTX-4090", 1, {"model": "google/gemma-3-4b-pt", "tuning": "lora", "method": "grpo", "rewards": ["numeric"],
                     "rollout": {"engine": "vllm"}, "sequence_length": 8192}),
    ("H100", 1, {"model": "mistralai/Mixtral-8x7B-v0.1", "tuning": "qlora"}),
    ("RTX-3060-12GB", 1, {"model": "google/gemma-3-4b-pt", "tuning": {"type": "dora"}, "sequence_length": 8192}),
]  # fmt: skip


@pytest.mark.parametrize(("gpu", "count", "keys"), CASES)
def test_each_remedy_makes_it_fit(gpu, count, keys):
    plan = planned(keys, gpu, count)
    ways = [warning for warning in plan.warnings if " would fit: " in warning]
    assert not plan.fits
    assert ways
    for warning in ways:
        changed, promised = applied(keys, warning, gpu, count)
        assert changed.fits, warning
        assert changed.memory.device_gib <= max(promised, changed.hardware.memory_gib), warning


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(MODELS), st.sampled_from(["RTX-3060-12GB", "RTX-4090", "A100", "T4"]), st.sampled_from([1, 4]),
    st.sampled_from(["full", "lora", "qlora", "dora"]), st.sampled_from(["sft", "dpo", "kto", "orpo", "reward"]),
    st.sampled_from([1024, 8192, 32768]), st.sampled_from(["auto", "none", "full"]), st.sampled_from(["auto", 2, 8]),
)  # fmt: skip
def test_no_remedy_is_in_vain(model, gpu, count, tuning, method, length, checkpointing, micro):
    keys = {
        "model": model, "tuning": tuning, "method": method, "sequence_length": length, "micro_batch": micro,
        "batch_size": 32, "hardware": {"checkpointing": checkpointing},
    }  # fmt: skip
    for warning in planned(keys, gpu, count).warnings:
        if " would fit: " in warning:
            assert applied(keys, warning, gpu, count)[0].fits, warning


def test_what_the_recipe_leaves_open_is_not_told():
    keys = {"model": "Qwen/Qwen3-8B", "tuning": "lora", "sequence_length": 8192}
    pinned = {**keys, "micro_batch": 4, "batch_size": 16, "hardware": {"checkpointing": "none"}}
    assert all(" with " not in warning for warning in planned(keys, "RTX-4060-Ti-16GB", 1).warnings)
    told = [warning for warning in planned(pinned, "RTX-3090", 1).warnings if "micro_batch: 1" in warning]
    assert any("with hardware.checkpointing: full" in warning for warning in told)


@pytest.mark.parametrize(
    ("gpu", "keys", "lever"),
    [
        ("RTX-4090", {"model": "Qwen/Qwen3-8B", "tuning": "full", "optimizer": {"name": "adamw-8bit"}}, "tuning: lora"),
        ("H100", {"model": "mistralai/Mixtral-8x7B-v0.1", "tuning": "lora"}, "a smaller model"),
        ("A100", {"model": "meta-llama/Llama-3.1-70B", "tuning": "lora"}, "tuning: qlora"),
        ("A100", {"model": "Qwen/Qwen3-8B", "tuning": "full", "optimizer": {"name": "adamw"}}, "optimizer.name"),
        ("H200", {"model": "Qwen/Qwen3-8B", "tuning": "lora", "micro_batch": 8, "batch_size": 16,
                  "sequence_length": 4096, "hardware": {"checkpointing": "none"}}, "hardware.checkpointing: full"),
    ],
)  # fmt: skip
def test_the_lever_is_one_that_is_not_pulled_yet(gpu, keys, lever):
    assert lever in planned(keys, gpu, 1).memory.lever


def test_reasons_hold():
    def why(plan: Plan, setting: str) -> str:
        return next(reason.why for reason in plan.reasons if reason.setting == setting)

    beyond = planned({"model": "Qwen/Qwen3-8B", "tuning": "full"}, "RTX-4090", 1)
    assert not beyond.fits
    assert why(beyond, "micro_batch").startswith("what needs least, and that does not fit; ")
    experts = planned({"model": "mistralai/Mixtral-8x7B-v0.1", "tuning": "qlora"}, "B200", 1)
    assert "leaves in 16 bits, 84.0 GiB" in why(experts, "quantization")
    assert all(reason.setting != "quantization" for reason in planned({**CASES[0][2]}, "RTX-4090", 1).reasons)
    for gpu, count, length in (("H100", 8, 8192), ("H200", 1, 2048), ("RTX-3090", 1, 2048)):
        plan = planned({"model": "Qwen/Qwen3-8B", "tuning": "lora", "sequence_length": length}, gpu, count)
        assert "faster" not in why(plan, "checkpointing")  # else it would have been chosen
        assert "faster" not in why(plan, "micro_batch")


def test_room_is_left_for_vllm_where_it_is_asked_for():
    keys = {"model": "Qwen/Qwen3-8B", "tuning": "lora", "method": "grpo", "rewards": ["numeric"]}
    free = planned({**keys, "rollout": {"engine": "transformers"}}, "A100", 1)
    shared = planned({**keys, "rollout": {"engine": "vllm"}}, "A100", 1)
    away = planned({**keys, "rollout": {"engine": "vllm", "server": "http://localhost:8000"}}, "A100", 1)
    copy = 1.25 * 2 * shared.model.parameters / 2**30
    assert shared.fits
    assert shared.memory.device_gib + copy + 0.05 * 79.15 <= 79.15
    assert any("left to vLLM's copy" in reason.why for reason in shared.reasons)
    assert away.memory.device_gib == free.memory.device_gib > shared.memory.device_gib
    small = planned({**keys, "rollout": {"engine": "vllm"}}, "RTX-4090", 1)
    assert not small.fits  # the model itself would, its copy beside it does not


def test_more_of_the_same_gpus_are_named_where_the_model_can_be_split_over_them():
    keys = {"model": "meta-llama/Llama-3.1-70B", "tuning": "lora"}
    more = [warning for warning in planned(keys, "H100", 1).warnings if warning.startswith("hardware.gpus: ")]
    assert len(more) == 1
    assert applied(keys, more[0], "H100", 1)[0].resolved.strategy == "fsdp"


def test_four_bits_are_named_where_they_have_to_be_split_too():
    keys = {"model": "meta-llama/Llama-3.1-70B", "tuning": "lora"}
    first = planned(keys, "RTX-4090", 4).warnings[0]
    assert first.startswith("tuning: qlora would fit")
    plan, _ = applied(keys, first, "RTX-4090", 4)
    assert plan.fits
    assert plan.resolved.strategy == "fsdp"


def test_what_is_advised_instead_of_a_processor_computes_in_16_bits_and_is_for_rent():
    node = cpu_node()
    plan = make_plan(
        Recipe.build({"model": "meta-llama/Llama-3.1-70B"}), architecture("meta-llama/Llama-3.1-70B"), node
    )
    larger = [warning for warning in plan.warnings if warning.startswith("hardware.gpu: ")]
    assert larger
    assert "USD" in larger[0]
    assert all("Laptop" not in warning and "MI3" not in warning for warning in larger)
    assert all(float(re.search(r"fit: ([\d.]+)", warning)[1]) < 160 for warning in larger)  # 141 GB of weights


def test_a_plan_says_why_the_model_is_not_split():
    plan = planned({"model": "mistralai/Mixtral-8x7B-v0.1", "tuning": "lora"}, "A100", 2)
    (why,) = [reason.why for reason in plan.reasons if reason.setting == "strategy"]
    assert not plan.fits
    assert "experts can't be split" in why


def test_the_runner_up_in_micro_batch_is_the_one_that_needs_least():
    keys = {"model": "meta-llama/Llama-3.1-8B", "tuning": "qlora", "sequence_length": 131072}
    (why,) = [reason.why for reason in planned(keys, "H100", 1).reasons if reason.setting == "micro_batch"]
    assert float(re.search(r"2 would need ([\d.]+) of", why)[1]) < 120
