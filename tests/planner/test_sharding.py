"""Sharing among devices: less is held the more is split, and what is sent for it takes time."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import GIB, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.interval import UNKNOWN, margins
from finetui.planner.links import communication_s
from finetui.planner.memory import peak_memory
from finetui.planner.settings import Settings
from finetui.planner.sharding import STRATEGIES, sent_bytes
from finetui.planner.shares import shares, stored
from finetui.planner.speed import step_speed
from finetui.planner.stacks import STACKS

LLAMA = Architecture.from_config(find_config("meta-llama/Llama-3.1-8B")[1], "Llama-3.1-8B")
H100, TRL = find_gpu("H100"), STACKS["transformers"]
FULL = Settings("full", 2048, world_size=8, strategy="fsdp")


def need(base: Settings = FULL, **changes) -> float:
    return peak_memory(LLAMA, dataclasses.replace(base, **changes), TRL, H100).device_gib


def test_each_stage_of_zero_holds_less():
    stages = [need(strategy=name, precision="bf16-mixed") for name in ("zero1", "zero2", "zero3")]
    assert stages == sorted(stages, reverse=True)
    assert stages[2] < 0.6 * stages[0]


def test_zero_keeps_16_bit_weights_and_fp32_masters():
    terms = peak_memory(
        LLAMA, dataclasses.replace(FULL, strategy="zero3", precision="bf16-mixed"), TRL, H100
    ).terms  # fmt: skip
    assert terms["weights"] == pytest.approx(2 * LLAMA.parameters / 8 / GIB)
    assert terms["optimizer"] >= 12 * LLAMA.parameters / 8 / GIB


def test_fsdp_of_mistral_on_two_devices_is_five_halves_of_its_weights():
    """Measured with a foreach AdamW: 33.7 GiB, which is weights, gradients, two states and one temporary over two."""
    mistral = Architecture.from_config(find_config("mistralai/Mistral-7B-v0.1")[1], "Mistral")
    stack = dataclasses.replace(TRL, fused_optimizer=False, upcasts_shards=False)
    two = Settings("full", 4096, micro_batch=2, world_size=2, strategy="fsdp")
    assert peak_memory(mistral, two, stack, find_gpu("A100")).allocated_gib == pytest.approx(33.7, rel=0.02)


def test_accelerate_shards_fp32_masters_of_what_it_trains():
    """Llama 3 8B loaded in 16 bits on two A100, AdamW in foreach: 74.8 GiB, 20 bytes a parameter over two."""
    llama = Architecture.from_config(find_config("meta-llama/Meta-Llama-3-8B")[1], "Llama-3-8B")
    stack = dataclasses.replace(TRL, fused_optimizer=False, fused_norm=True)
    two = Settings("full", 4096, micro_batch=1, world_size=2, strategy="fsdp")
    assert peak_memory(llama, two, stack, find_gpu("A100")).allocated_gib == pytest.approx(74.8, rel=0.02)
    adapters = dataclasses.replace(two, tuning="lora")
    assert adapters.under(TRL) == adapters, "a frozen base stays as it is"
    assert two.under(STACKS["torchtune"]) == two
    assert dataclasses.replace(two, world_size=1).under(TRL).precision == "bf16"


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_frozen_base_layers_and_table_are_split_and_two_layers_stand_whole(tied):
    shape = dataclasses.replace(LLAMA, tied=tied)
    ours, split = STACKS["finetui"], Settings("lora", 2048, world_size=4, strategy="fsdp")
    fixed = stored(shape, split, ours)
    mine, theirs = (
        shares(shape, split, stack, fixed) for stack in (ours, dataclasses.replace(ours, shares_base=False))
    )
    head = 2 * (shape.vocab * shape.hidden + shape.final_norm)
    assert mine.weights - theirs.weights == pytest.approx(0.75 * head), "the head is whole on each"
    assert mine.whole.loss == mine.whole.backward == mine.whole.stranded == 0
    assert mine.buffers == 2 * 2 * max(layer.parameters for layer in shape.layers)
    assert mine.adapter == pytest.approx(1.25 * fixed.adapter)
    assert mine.gradients == fixed.gradients
    assert mine.optimizer == fixed.optimizer / 4
    all_weights = dataclasses.replace(split, tuning="full")
    full = stored(shape, all_weights, ours)
    assert shares(shape, all_weights, ours, full).weights == full.weights / 4


@pytest.mark.parametrize(("model", "tuning", "measured"), [
    ("meta-llama/Llama-3.1-8B", "lora", 0.235), ("Qwen/Qwen3-4B", "full", 0.245),
])  # fmt: skip
def test_short_steps_wait_for_fsdp2_on_the_host(model, tuning, measured):
    """8 rows of 342 on each of two H200, seconds; adapters' bases were FSDP2's then."""
    shape = Architecture.from_config(find_config(model)[1], model)
    then = dataclasses.replace(STACKS["finetui"], shares_base=False)
    split = Settings(tuning, 342, micro_batch=8, world_size=2, strategy="fsdp", checkpointing="none")
    found = step_speed(shape, split, then, find_gpu("H200"))
    assert found.step_s == pytest.approx(measured, rel=0.08)
    assert found.terms["launch"] > 0.05
    now = step_speed(shape, split, STACKS["finetui"], find_gpu("H200"))
    assert (now.terms["launch"] < 0.02) is (tuning == "lora")


def test_a_step_of_two_h200_takes_as_long_as_is_planned():
    """8B LoRA, 8 rows of 512 on each: 0.260 s, 31,527 tokens/s (``tests/bench/split_runs.py``)."""
    split = Settings("lora", 512, micro_batch=8, world_size=2, strategy="fsdp", checkpointing="none")
    found = step_speed(LLAMA, split, STACKS["finetui"], find_gpu("H200"))
    assert found.tokens_per_s == pytest.approx(31_527, rel=0.02)
    whole = step_speed(LLAMA, dataclasses.replace(split, strategy="ddp"), STACKS["finetui"], find_gpu("H200"))
    assert found.step_s > whole.step_s


def test_a_shared_base_is_not_sent_where_it_is_still_there():
    ours, h200 = STACKS["finetui"], find_gpu("H200")
    split = Settings("lora", 512, world_size=2, strategy="fsdp")
    few, more, most = (communication_s(with_layers(layers), split, ours, h200, 1.0, 0.6) for layers in (2, 3, 4))
    assert 0 < few < more
    assert most - more == pytest.approx(more - few, rel=0.01)
    assert communication_s(with_layers(4), split, ours, h200, 1.0, 0.6, idle_s=1.0) == pytest.approx(few, rel=0.05)


def with_layers(count: int) -> Architecture:
    """Of Llama's, so many layers."""
    return dataclasses.replace(LLAMA, layers=tuple(dataclasses.replace(layer, count=count) for layer in LLAMA.layers))


def test_fsdp1_over_frozen_layers_holds_the_gradients_of_their_inputs():
    """Llama 3 8B with LoRA on two and four A100 took 774,432 B a token where one took 528,672: 30 x 8,192 B more."""
    llama = Architecture.from_config(find_config("meta-llama/Meta-Llama-3-8B")[1], "Llama-3-8B")
    held = dataclasses.replace(TRL, loss="chunks", holds_input_gradients=True)
    plain = dataclasses.replace(held, holds_input_gradients=False)

    def each(stack, **changes) -> float:
        base = Settings("lora", 4096, targets=("q_proj", "v_proj"), world_size=2, strategy="fsdp")
        few, many = (
            peak_memory(llama, dataclasses.replace(base, micro_batch=n, **changes), stack, H100).allocated_gib
            for n in (8, 16)
        )
        return (many - few) * GIB / (8 * 4096)

    assert each(held) - each(plain) == pytest.approx(30 * 8192, rel=0.12)
    assert each(held, strategy="ddp") == pytest.approx(each(plain, strategy="ddp"))
    assert each(held, tuning="full") == pytest.approx(each(plain, tuning="full"))


def test_zero_2_has_its_bucket_however_little_it_reduces():
    adapters = {"tuning": "lora", "precision": "bf16"}
    more = need(strategy="zero2", **adapters) - need(strategy="zero1", **adapters)
    assert more > 0.7


def test_4_bit_models_are_sharded_as_they_are():
    """``prepare_model_for_kbit_training`` is left out where a model is split: embeddings and norms stay in 16 bits."""
    qlora = {"tuning": "qlora", "quantization": "nf4", "precision": "bf16", "sequence_length": 8192, "micro_batch": 4}
    upright = dataclasses.replace(TRL, kbit_upcast=False)
    settings_ = dataclasses.replace(FULL, **qlora)
    assert peak_memory(LLAMA, settings_, TRL, H100) == peak_memory(LLAMA, settings_, upright, H100)
    alone = dataclasses.replace(settings_, world_size=1)
    assert peak_memory(LLAMA, alone, TRL, H100).allocated_gib > peak_memory(LLAMA, alone, upright, H100).allocated_gib


def test_zero_3_waits_for_its_own_python_where_rows_are_short():
    """Full fine-tuning of a 1.8B model took 260 to 275 ms a micro-batch of 256 and of 1,024 tokens (QwenLM/Qwen)."""
    small = Architecture.from_config(find_config("Qwen/Qwen2.5-1.5B")[1], "Qwen2.5-1.5B")
    few, many = (
        step_speed(small, Settings("full", n, strategy="zero3"), TRL, find_gpu("A100")).step_s for n in (256, 1024)
    )
    assert few == pytest.approx(many, rel=0.1)
    assert few > 0.2


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([name for name, s in STRATEGIES.items() if s.optimizer]), st.sampled_from(["full", "lora"]),
    st.integers(2, 16), st.integers(1, 8), st.integers(1, 4),
)  # fmt: skip
def test_memory_never_falls_with_less_sharding(strategy, tuning, world, micro, accumulation):
    precision = "bf16-mixed" if tuning == "full" else "bf16"
    base = Settings(
        tuning, 1024, micro_batch=micro, accumulation=accumulation, world_size=world, strategy=strategy,
        precision=precision,
    )  # fmt: skip
    assert need(base) >= need(base, world_size=world + 1) - 1e-9
    assert need(base, offload="optimizer") <= need(base) + 1e-9
    assert need(base, offload="parameters") <= need(base, offload="optimizer") + 1e-9


def test_sending_costs_time_and_single_devices_send_nothing():
    full, shard = (
        sent_bytes(STRATEGIES["ddp"], 8, weights=16e9, gradients=16e9),
        sent_bytes(STRATEGIES["fsdp"], 8, weights=16e9, gradients=16e9),
    )
    assert full == (0.0, pytest.approx(2 * 7 / 8 * 16e9))
    assert shard == (pytest.approx(3 * 7 / 8 * 16e9), 0.0)
    assert sent_bytes(STRATEGIES["fsdp"], 1, weights=16e9, gradients=16e9) == (0.0, 0.0)
    fast, slow = (step_speed(LLAMA, FULL, TRL, find_gpu(name)) for name in ("A100", "A100-80GB-PCIe"))
    assert slow.terms["communication"] > 3 * fast.terms["communication"]
    offloaded = step_speed(LLAMA, dataclasses.replace(FULL, offload="parameters"), TRL, H100)
    assert offloaded.terms["offload"] > 0
    assert offloaded.step_s > step_speed(LLAMA, FULL, TRL, H100).step_s


def test_each_unknown_widens_the_interval():
    known = {"stored": 16.0 * GIB, "moving": 8.0 * GIB, "slack": 1.0 * GIB, "context": 0.5 * GIB}
    base = margins(**known)
    assert base["allocated"] < base["reserved"] < base["device"]
    for name in UNKNOWN:
        wider = margins(**known, unknown=(name,))
        assert all(wider[metric] > base[metric] for metric in base), name


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp", "shard-grad-op"])
def test_sharded_mixed_precision_passes_16_bits_between_layers(strategy):
    """Autocast over fp32 weights leaves the residual stream in fp32; gathered 16-bit weights do not."""
    keeps = Settings(
        "full", 4096, micro_batch=2, world_size=8, strategy=strategy, precision="bf16-mixed", checkpointing="none"
    )
    kept = peak_memory(LLAMA, keeps, TRL, find_gpu("A100")).terms["activations"]
    pure = dataclasses.replace(keeps, precision="bf16")
    alone = dataclasses.replace(keeps, strategy="ddp")
    assert kept == pytest.approx(peak_memory(LLAMA, pure, TRL, find_gpu("A100")).terms["activations"])
    assert kept < 0.9 * peak_memory(LLAMA, alone, TRL, find_gpu("A100")).terms["activations"]


def test_kept_outputs_cost_memory_and_spare_half_of_the_products():
    full = Settings("full", 8192, world_size=8, strategy="fsdp", precision="bf16-mixed", checkpointing="full")
    some = dataclasses.replace(full, keeps_outputs=True)
    gpu, stack = find_gpu("H100"), STACKS["transformers"]
    # torchtitan keeps what q, v, gate and down give, and attention: 2 bytes of (q + kv + inner + 2 hidden) a layer
    wide = 2 * (4096 + 1024 + 14336 + 4096 + 4096) * 8192 * 32 / GIB
    more = peak_memory(LLAMA, some, stack, gpu).terms["activations"]
    assert more - peak_memory(LLAMA, full, stack, gpu).terms["activations"] == pytest.approx(wide, rel=0.1)
    before, after = (step_speed(LLAMA, way, stack, gpu).terms for way in (full, some))
    assert 0.3 < after["recompute"] / before["recompute"] < 0.7
    assert after["attention"] < before["attention"]
