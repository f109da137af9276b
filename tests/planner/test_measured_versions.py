"""Rows of measured runs by what their versions, data and kernels did: each becomes the stack and the lengths it had."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import finetui
from finetui.planner.architecture import Architecture
from finetui.planner.memory import peak_memory

ROOT = Path(finetui.__file__).parent
sys.path.insert(0, str(ROOT))
measured = importlib.import_module("tests.bench.measured")
words = importlib.import_module("tests.bench.measured_words")
sys.path.pop(0)

ROW = {
    "source": "github.com/someone/runs README.md", "model": "meta-llama/Llama-3.1-8B", "method": "lora",
    "gpu": "A100-80GB", "num_gpus": "1", "seq_len": "4096", "micro_batch": "2", "grad_ckpt": "yes",
    "flash_or_sdpa": "sdpa", "optimizer": "adamw_8bit", "lora_r": "16", "targets": "all-linear",
    "framework": "HF Trainer + PEFT", "fused": "none", "measured_peak_gb": "20", "measured_tokens_per_s": "",
    "notes": "metric=torch max_memory_allocated (GiB)",
}  # fmt: skip


def ask(**changes: str):
    return measured.question({**ROW, **changes})


def gib(asked) -> dict[str, float]:
    return peak_memory(asked.architecture, asked.settings, asked.stack, asked.gpu).terms


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"framework": "Unsloth 2023.12"}, {"loss": "logits", "offloads_checkpoints": False, "compiled": False}),
        ({"framework": "Unsloth 2024.3"}, {"loss": "logits", "offloads_checkpoints": False}),
        ({"framework": "Unsloth 2024.12"}, {"loss": "rows", "offloads_checkpoints": True}),
        ({"framework": "Unsloth"}, {"loss": "rows", "offloads_checkpoints": True}),
        ({"optimizer": "adamw_torch"}, {"fused_optimizer": False}),
        ({"optimizer": "adamw_torch_fused"}, {"fused_optimizer": True}),
        ({"optimizer": "adamw_torch", "framework": "HF Trainer + DeepSpeed ZeRO-2"}, {"fused_optimizer": True}),
        ({"notes": "bnb 0.41.3"}, {"keeps_packed_inputs": 1}),
        ({"notes": "bitsandbytes==0.42.0"}, {"keeps_packed_inputs": 1}),
        ({"notes": "bnb 0.43.1"}, {"keeps_packed_inputs": 0}),
        ({"notes": "bnb 0.41.3", "framework": "Unsloth 2023.12"}, {"keeps_packed_inputs": 0}),
        ({"framework": "ms-swift 3.x", "notes": "sequence_parallel_size 4", "num_gpus": "4"}, {"logit_backward": 8.0}),
        ({"framework": "ms-swift 3.x"}, {"logit_backward": 14.0}),
        ({"framework": "torchtitan FSDP2 + torch.compile", "notes": "torch 2.7"}, {"logit_backward": 4.0}),
        ({"framework": "axolotl + FSDP2"}, {"upcasts_shards": False}),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items())[:60],
)
def test_versions_make_the_stack(changes, expected):
    stack = ask(**changes).stack
    assert {name: getattr(stack, name) for name in expected} == expected


def test_a_whole_fine_tune_under_fsdp2_splits_what_axolotl_loaded():
    full = {"method": "full", "lora_r": "", "targets": "all", "num_gpus": "4"}
    split, upcast = (gib(ask(**full, framework=name)) for name in ("axolotl + FSDP2", "ms-swift 3.x FSDP2"))
    assert split["weights"] == pytest.approx(upcast["weights"] / 2, rel=0.05)


@pytest.mark.parametrize(
    ("text", "rows", "widest"),
    [
        ("padded to the longest", 4, 6.0), ("1 of 99th percentile", 4, 2.75), ("padding-free", 1, 6.0),
        ("padding-free", 5, 2.0), ("rows flattened into one", 20, 1.25),
    ],
)  # fmt: skip
def test_the_widest_micro_batch_is_a_multiple_of_the_mean(text, rows, widest):
    assert words.widest_of(text, rows) == widest


def test_a_mean_that_is_told_makes_the_widest_row():
    padded = ask(seq_len="<=4096 (mean 178)", micro_batch="4")
    flat = ask(seq_len="<=4096 (mean 178)", micro_batch="4", notes="padding-free; max_memory_allocated")
    assert padded.settings.sequence_length == 6 * 178
    assert flat.settings.sequence_length == round(178 * 9 / 4)
    assert ask(seq_len="<=512 (mean 178)").settings.sequence_length == 512


def test_short_rows_are_those_of_the_data_the_scripts_train_on():
    asked = ask(seq_len="<=2048 short")
    assert asked.settings.sequence_length == 600
    assert "short" in asked.unknown


def test_lengths_vary_where_a_bound_alone_is_told():
    assert ask(seq_len="<=2048").settings.varies
    assert ask(seq_len="<=2048 short").settings.varies
    assert not ask(seq_len="2048").settings.varies
    assert not ask(seq_len="<=2048", notes="torch.cuda.empty_cache() each step").settings.varies


def test_both_halves_of_a_packed_pair_are_in_the_row():
    packed = {"method": "dpo lora", "framework": "ms-swift 3.x", "seq_len": "8192 packed"}
    assert ask(**packed).settings.sequence_length == 4096
    assert ask(**{**packed, "method": "lora"}).settings.sequence_length == 8192
    assert ask(**{**packed, "seq_len": "8192"}).settings.sequence_length == 8192


def test_targets_of_a_shared_expert_are_not_those_of_routed_ones():
    targets = "q_proj,v_proj,shared_expert.up_proj,shared_expert.down_proj,shared_expert.gate_proj"
    asked = ask(model="Qwen/Qwen3-Next-80B-A3B-Instruct", targets=targets)
    assert asked.settings.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("model", ["mistralai/Ministral-8B-Instruct-2410", "Ministral-8B-2410"])
def test_dates_may_follow_what_a_model_was_tuned_for(model):
    assert "Ministral-8B" in ask(model=model).architecture.name
    assert ask(model=model).architecture.parameters == 8_019_808_256


def test_shapes_of_the_further_table_have_the_counts_of_the_hub():
    shapes = json.loads((ROOT / "tests/bench/data/shapes.json").read_text())
    counts = {
        "ByteDance-Seed/Seed-OSS-36B-Base": 36_151_104_512, "Qwen/Qwen3-Next-80B-A3B": 79_674_391_296,
        "zai-org/GLM-4.5-Air": 106_852_245_504, "Qwen/Qwen3.5-27B": 26_895_998_464,
        "swiss-ai/Apertus-8B-2509": 8_053_338_176,
    }  # fmt: skip
    for name, count in counts.items():
        assert Architecture.from_config(shapes[name], name).parameters == count


def test_four_bit_products_of_old_hold_on_to_their_inputs_between_layers():
    """bitsandbytes before 0.43: what computes a layer again leaves them behind too."""
    nf4 = ask(method="qlora-nf4", notes="bnb 0.41.3")
    new = replace(nf4, stack=replace(nf4.stack, keeps_packed_inputs=0))
    layers = nf4.architecture.num_layers
    kept = 2 * (2 * 4096 + 4096 + 14336) * layers * nf4.settings.tokens / 2**30
    assert gib(nf4)["activations"] - gib(new)["activations"] == pytest.approx(kept, rel=0.02)
    eight = ask(method="lora", notes="bnb 0.41.3")
    assert gib(eight) == gib(replace(eight, stack=replace(eight.stack, keeps_packed_inputs=0)))
