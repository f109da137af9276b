"""Checkpointing policies: what each costs in memory and time, which a run can use, and how the solver chooses."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetui.planner.architecture import Architecture
from finetui.planner.errors import HardwareError, RecipeError
from finetui.planner.fused import parked_bytes
from finetui.planner.hardware import GIB, Gpu, Node, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.memory import peak_memory
from finetui.planner.plan import Plan
from finetui.planner.policies import can_park, most_layers
from finetui.planner.recipe import Recipe
from finetui.planner.settings import Settings
from finetui.planner.solver import make_plan
from finetui.planner.speed import step_speed
from finetui.planner.stacks import STACKS

LLAMA = Architecture.from_config(find_config("meta-llama/Llama-3.1-8B")[1], "Llama-3.1-8B")
GEMMA = Architecture.from_config(find_config("google/gemma-2-9b")[1], "gemma-2-9b")
OURS, TRL, H200 = STACKS["finetui"], STACKS["trl"], find_gpu("H200")
BASE = Settings("lora", 2048, micro_batch=4, optimizer="adamw-8bit")


def plan(gpu: str, **keys) -> Plan:
    return make_plan(Recipe.build({"model": "m", "sequence_length": 2048, **keys}), LLAMA, Node(find_gpu(gpu)))


def need(policy: str, stack=OURS, **changes) -> float:
    return peak_memory(LLAMA, dataclasses.replace(BASE, checkpointing=policy, **changes), stack, H200).device_gib


def seconds(policy: str, stack=OURS, **changes) -> float:
    return step_speed(LLAMA, dataclasses.replace(BASE, checkpointing=policy, **changes), stack, H200).step_s


@pytest.mark.parametrize("stack", [OURS, TRL], ids=lambda stack: stack.name)
def test_each_policy_trades_memory_for_time(stack):
    half = {"kept_layers": LLAMA.num_layers // 2}
    assert need("none", stack) > need("selective", stack, **half) > need("full", stack) >= need("offload", stack)
    assert seconds("none", stack) < seconds("selective", stack, **half) < seconds("full", stack)


def test_what_is_parked_spares_the_attention_and_its_projection():
    assert need("offload") < need("full") - 1
    assert seconds("none") < seconds("offload") < seconds("full")
    slow = dataclasses.replace(H200, pcie_gb_s=2.0)
    parked = dataclasses.replace(BASE, checkpointing="offload")
    assert step_speed(LLAMA, parked, OURS, slow).terms["parking"] > 1.0
    assert step_speed(LLAMA, parked, OURS, H200).terms["parking"] < 0.05


def test_the_ends_of_selective_are_the_other_two():
    assert need("selective", kept_layers=0) == need("full")
    assert need("selective", kept_layers=LLAMA.num_layers) == need("none")
    assert seconds("selective", kept_layers=LLAMA.num_layers) == pytest.approx(seconds("none"))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["lora", "qlora", "full"]), st.sampled_from([OURS, TRL]), st.integers(0, 31), st.integers(1, 8),
    st.sampled_from([512, 4096]),
)  # fmt: skip
def test_each_kept_layer_costs_memory_and_spares_time(tuning, stack, kept, micro, length):
    """But for its input: the last layer's is freed before the first that computes again needs its own."""
    base = Settings(
        tuning, length, micro_batch=micro, checkpointing="selective", kept_layers=kept,
        quantization="nf4" if tuning == "qlora" else "none",
    )  # fmt: skip
    more = dataclasses.replace(base, kept_layers=kept + 1)
    before, after = (peak_memory(LLAMA, each, stack, H200).device_gib for each in (base, more))
    assert after >= before - 4 * 4096 * base.tokens / GIB
    assert step_speed(LLAMA, more, stack, H200).step_s <= step_speed(LLAMA, base, stack, H200).step_s + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.floats(12, 60), st.sampled_from([OURS, TRL]), st.integers(1, 4))
def test_as_many_layers_are_kept_as_fit_and_not_one_more(limit, stack, micro):
    base = dataclasses.replace(BASE, micro_batch=micro)
    chosen = most_layers(LLAMA, base, stack, H200, limit)
    kept = chosen.kept_layers
    assert 0 <= kept < LLAMA.num_layers
    assert not kept or peak_memory(LLAMA, chosen, stack, H200).high_gib <= limit
    if kept < LLAMA.num_layers - 1:
        more = dataclasses.replace(chosen, kept_layers=kept + 1)
        assert peak_memory(LLAMA, more, stack, H200).high_gib > limit


def test_the_solver_takes_the_fastest_policy_that_fits():
    roomy, tight = plan("H200"), plan("L4")
    assert (roomy.resolved.checkpointing, roomy.resolved.kept_layers) == ("none", 0)
    assert tight.resolved.checkpointing == "selective"
    assert 0 < tight.resolved.kept_layers < LLAMA.num_layers
    why = next(reason.why for reason in tight.reasons if reason.setting == "checkpointing")
    assert f"last {tight.resolved.kept_layers} layers keep" in why
    assert "slower" in why


def test_what_is_asked_for_is_taken():
    for policy in ("none", "selective", "offload", "full"):
        assert plan("H200", hardware={"checkpointing": policy}).resolved.checkpointing == policy
    kept = plan("H200", hardware={"checkpointing": "selective", "kept_layers": 5}).resolved
    assert (kept.checkpointing, kept.kept_layers) == ("selective", 5)
    with pytest.raises(RecipeError, match="kept_layers has no effect here"):
        Recipe.build({"model": "m", "hardware": {"checkpointing": "full", "kept_layers": 5}})


@pytest.mark.parametrize(
    ("architecture", "node", "changes", "why"),
    [
        (LLAMA, Node(Gpu("CPU", 64.0, 20.0, 0.2, 0.2, kind="cpu"), local=True), {}, "memory is the host's"),
        (LLAMA, Node(H200), {"kind": "ia3"}, "only whole-layer kernels park"),
        (GEMMA, Node(H200), {}, "only whole-layer kernels park"),
        (LLAMA, Node(H200, host_memory_gib=8.0), {}, "6 GiB of host memory, of which 4 may be used"),
    ],
)
def test_where_nothing_can_be_parked_it_says_why(architecture, node, changes, why):
    base = dataclasses.replace(BASE, **changes)
    assert why in can_park(architecture, base, OURS, node)
    tuning = changes.get("kind", "lora")
    recipe = Recipe.build(
        {
            "model": "m",
            "tuning": tuning,
            "sequence_length": 2048,
            "micro_batch": 4,
            "hardware": {"checkpointing": "offload"},
        }
    )
    with pytest.raises(HardwareError, match=f"hardware.checkpointing: nothing can be offloaded: .*{why[:20]}"):
        make_plan(recipe, architecture, node)


def test_parked_bytes_are_the_layer_input_the_attention_output_and_the_sum_after_it():
    parked = parked_bytes(LLAMA, dataclasses.replace(BASE, checkpointing="offload"), OURS)
    assert parked == 32 * 8192 * 3 * 2 * 4096
    assert parked / GIB == pytest.approx(6.0)
    assert parked_bytes(LLAMA, BASE, OURS) == 0.0


def test_eight_bit_weights_halve_what_is_stored_and_quicken_the_products():
    plain, eight = BASE, dataclasses.replace(BASE, quantization="fp8")
    weights = [peak_memory(LLAMA, each, OURS, H200).terms["weights"] for each in (plain, eight)]
    assert weights[1] == pytest.approx(weights[0] - LLAMA.linear_weights / GIB, rel=0.01)
    assert step_speed(LLAMA, eight, OURS, H200).step_s < 0.75 * step_speed(LLAMA, plain, OURS, H200).step_s
    a100 = find_gpu("A100")  # without 8-bit products weights are turned back
    assert step_speed(LLAMA, eight, OURS, a100).step_s > step_speed(LLAMA, plain, OURS, a100).step_s
