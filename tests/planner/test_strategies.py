"""When a model is split over devices, and what is said where it can't be."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.errors import RecipeError
from finetui.planner.hardware import Gpu, Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe
from finetui.planner.solver import make_plan

LLAMA, SMALL = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-0.6B"


@cache
def architecture(name: str) -> Architecture:
    return Architecture.from_config(find_config(name)[1], name)


def plan(model: str = LLAMA, gpu: str = "A100-40GB", count: int = 4, framework: str = "finetui", **keys: Any) -> Plan:
    recipe = Recipe.build({"model": model, **keys})
    return make_plan(recipe, architecture(model), Node(find_gpu(gpu), count), framework=framework)


def why(answer: Plan, setting: str) -> str:
    return next(reason.why for reason in answer.reasons if reason.setting == setting)


def test_a_model_that_fits_on_no_single_device_is_split() -> None:
    answer = plan(tuning="full")
    assert answer.fits
    assert json.loads(answer.to_json())["resolved"]["strategy"] == "fsdp"
    assert answer.resolved.optimizer == "adamw"
    assert "split over 4 devices" in why(answer, "strategy")
    assert "ddp, which holds all of them on each, would need" in why(answer, "strategy")
    whole = plan(tuning="full", hardware={"strategy": "ddp"}, optimizer={"name": "adamw"})
    assert not whole.fits
    assert answer.memory.terms["weights"] < 0.6 * whole.memory.terms["weights"]
    assert any("hardware.strategy: fsdp" in warning for warning in whole.warnings)


@pytest.mark.parametrize(("model", "tuning"), [(LLAMA, "lora"), (SMALL, "full")])
def test_a_model_that_fits_on_each_device_stays_whole(model: str, tuning: str) -> None:
    answer = plan(model, tuning=tuning)
    assert answer.resolved.strategy == "ddp"
    assert "its share of the batch" in why(answer, "strategy")


def test_adapters_on_a_large_base_are_split_and_their_gradients_add_up_whole() -> None:
    answer = plan("meta-llama/Llama-3.3-70B-Instruct", "A100-80GB", 4, tuning="lora", micro_batch=1)
    assert answer.fits
    assert answer.resolved.strategy == "fsdp"
    assert answer.resolved.accumulation == 4
    shape = architecture("meta-llama/Llama-3.3-70B-Instruct")
    base, head = (2 * number / 2**30 for number in (shape.parameters, shape.vocab * shape.hidden))
    assert answer.memory.terms["weights"] == pytest.approx((base - head) / 4 + head, rel=0.001)
    pairs = 4 * answer.model.trainable / 2**30
    assert answer.memory.terms["gradients"] >= 0.9 * pairs


def test_a_base_in_4_bits_that_is_too_large_for_one_is_split() -> None:
    asked: dict[str, Any] = {"tuning": "qlora", "sequence_length": 512}
    whole = plan("meta-llama/Llama-3.3-70B-Instruct", "RTX5090", 4, **asked, hardware={"strategy": "ddp"})
    assert not whole.fits
    answer = plan("meta-llama/Llama-3.3-70B-Instruct", "RTX5090", 4, **asked)
    assert answer.fits
    assert answer.resolved.strategy == "fsdp"
    assert answer.memory.terms["weights"] < 0.4 * whole.memory.terms["weights"]


@pytest.mark.parametrize(("model", "tuning", "precision", "measured"), [
    (LLAMA, "lora", "auto", 21.20),
    (LLAMA, "qlora", "auto", 16.11),
    ("Qwen/Qwen3-4B", "full", "bf16", 23.55),
])  # fmt: skip
def test_two_h200_needed_what_is_planned(model: str, tuning: str, precision: str, measured: float) -> None:
    """8 rows of 512 on each (``tests/bench/split_runs.py``), GiB that PyTorch's allocator told of."""
    hardware = {"strategy": "fsdp", "precision": precision}
    more: dict[str, Any] = {
        "method": "pretrain",
        "sequence_length": 512,
        "batch_size": 16,
        "optimizer": {"name": "adamw"},
    }
    answer = plan(model, "H200", 2, tuning=tuning, hardware=hardware, **more)
    assert (answer.resolved.checkpointing, answer.resolved.micro_batch) == ("none", 8)
    assert answer.memory.allocated_gib == pytest.approx(measured, rel=0.01 if tuning != "full" else 0.04)


def test_what_fits_whole_is_not_split() -> None:
    assert plan(gpu="H200", count=2, tuning="lora", sequence_length=512, batch_size=16).resolved.strategy == "ddp"


def test_states_in_8_bits_are_split_once_those_in_32_do_not_fit() -> None:
    tight = plan(tuning="full", count=2)
    assert tight.fits
    assert (tight.resolved.strategy, tight.resolved.optimizer) == ("fsdp", "adamw-8bit")
    asked = plan(tuning="full", optimizer={"name": "lion-8bit"}, hardware={"strategy": "fsdp"})
    assert asked.resolved.optimizer == "lion-8bit"
    roomy = plan(tuning="full", hardware={"strategy": "fsdp"}, optimizer={"name": "adamw"})
    assert asked.memory.terms["optimizer"] < 0.5 * roomy.memory.terms["optimizer"]


@pytest.mark.parametrize("keys", [
    {"tuning": "lora-fp8"},
    {"tuning": "qdora"},
    {"tuning": {"type": "lora", "modules_to_save": ["lm_head"]}},
    {"tuning": {"type": "lora", "init": "pissa"}},
    {"tuning": "full", "optimizer": {"name": "muon"}},
    {"tuning": "full", "optimizer": {"name": "adafactor"}},
    {"method": "reward"},
    {"method": "kto", "tuning": "full"},
    {"method": "dpo", "tuning": "full", "preference": {"reference": "live"}},
    {"method": "dpo", "preference": {"share_prompt": True}},
    {"hardware": {"precision": "fp16"}},
])  # fmt: skip
def test_what_can_t_be_split_is_refused_before_it_starts(keys: dict[str, Any]) -> None:
    hardware = {**keys.pop("hardware", {}), "strategy": "fsdp"}
    with pytest.raises(RecipeError, match="split") as caught:
        plan(hardware=hardware, **keys)
    assert caught.value.where
    assert caught.value.do
    hardware["strategy"] = "auto"
    assert plan(hardware=hardware, **keys).resolved.strategy == "ddp"


def test_a_model_of_pairs_is_split_where_its_reference_needs_no_second_model() -> None:
    for keys in ({"tuning": "lora"}, {"tuning": "full"}):
        answer = plan(method="dpo", hardware={"strategy": "fsdp"}, **keys)
        assert answer.resolved.strategy == "fsdp"
    for tuning in ("dora", "rslora", "lora+"):
        assert plan(tuning=tuning, hardware={"strategy": "fsdp"}).resolved.strategy == "fsdp"
    assert plan(method="kto", tuning="lora", hardware={"strategy": "fsdp"}).resolved.strategy == "fsdp"


def test_one_device_has_nothing_to_split_over() -> None:
    with pytest.raises(RecipeError, match="more than one GPU"):
        Recipe.build({"model": LLAMA, "hardware": {"strategy": "fsdp", "gpus": 1}})
    assert plan(count=1, tuning="full").resolved.strategy == "single"


def test_other_programs_are_predicted_as_they_were_asked_to() -> None:
    assert plan(tuning="full", framework="trl").resolved.strategy == "ddp"
    assert plan(tuning="qlora", framework="trl", hardware={"strategy": "fsdp"}).resolved.strategy == "fsdp"


def test_a_cpu_splits_what_it_is_told_to() -> None:
    node = Node(Gpu("CPU", 64.0, 20.0, 0.2, 0.2, kind="cpu"), local=True)
    asked = {"model": SMALL, "tuning": "full", "hardware": {"gpus": 2, "strategy": "fsdp"}}
    assert make_plan(Recipe.build(asked), architecture(SMALL), node).resolved.strategy == "fsdp"
    asked["hardware"] = {"gpus": 2}
    assert make_plan(Recipe.build(asked), architecture(SMALL), node).resolved.strategy == "ddp"
