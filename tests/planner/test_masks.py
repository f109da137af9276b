"""Masks of attention: which runs hand one to their kernel, and what it costs."""

from __future__ import annotations

import dataclasses

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import GIB, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.masks import mask_bytes, masked_share, runs_eager
from finetui.planner.memory import peak_memory
from finetui.planner.settings import Settings
from finetui.planner.stacks import STACKS

TRL, H200 = STACKS["trl"], find_gpu("H200")


def shape(model: str) -> Architecture:
    return Architecture.from_config(find_config(model)[1], model)


GEMMA, LLAMA = shape("google/gemma-3-1b-pt"), shape("meta-llama/Llama-3.2-1B")  # every sixth layer sees all
BASE = Settings("lora", 1024, micro_batch=4, checkpointing="none")


@pytest.mark.parametrize(
    ("architecture", "changes", "share"),
    [
        (GEMMA, {}, 22 / 26), (GEMMA, {"sequence_length": 511}, 0.0), (GEMMA, {"sequence_length": 512}, 22 / 26),
        (GEMMA, {"attention": "flash"}, 0.0), (GEMMA, {"masked": True}, 1.0), (LLAMA, {}, 0.0),
        (LLAMA, {"masked": True}, 1.0),
    ],
)  # fmt: skip
def test_layers_with_a_window_that_a_row_fills_are_handed_a_mask(architecture, changes, share):
    assert masked_share(architecture, dataclasses.replace(BASE, **changes), TRL) == pytest.approx(share)


def test_a_mask_has_a_byte_per_pair_of_positions_and_each_layer_keeps_two():
    assert mask_bytes(GEMMA, BASE, TRL) == 4 * 1024**2
    free = dataclasses.replace(BASE, attention="flash")
    kept = peak_memory(GEMMA, BASE, TRL, H200).allocated_gib - peak_memory(GEMMA, free, TRL, H200).allocated_gib
    assert kept == pytest.approx((22 * 2 + 1) * 4 * 1024**2 / GIB, rel=0.01)


@pytest.mark.parametrize(
    ("model", "attention", "eager"),
    [("google/gemma-2-2b", "sdpa", True), ("google/gemma-2-2b", "flash", False),
     ("meta-llama/Llama-3.2-1B", "sdpa", False), ("meta-llama/Llama-3.2-1B", "eager", True)],
)  # fmt: skip
def test_where_scores_are_written_out(model, attention, eager):
    assert runs_eager(shape(model), dataclasses.replace(BASE, attention=attention), TRL) is eager


def test_fp32_with_shared_keys_has_no_fused_kernel():
    ours = STACKS["finetui"]
    fp32 = dataclasses.replace(BASE, precision="fp32")
    scores = 4 * 32 * 1024 * 4096 * LLAMA.num_layers / GIB
    assert peak_memory(LLAMA, fp32, ours, H200).allocated_gib > scores
    assert peak_memory(LLAMA, BASE, ours, H200).allocated_gib < scores
