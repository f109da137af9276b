"""Whole-layer functions: where they run, what they keep, and that other stacks and models are left alone."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import finetui
from finetui.planner.architecture import Architecture
from finetui.planner.fused import layer_bytes, recomputed_weights, stack_on
from finetui.planner.hardware import GIB, find_gpu
from finetui.planner.hub import find_config
from finetui.planner.memory import peak_memory
from finetui.planner.settings import Settings
from finetui.planner.speed import step_speed
from finetui.planner.stacks import STACKS

OURS, TRL, H200 = STACKS["finetui"], STACKS["trl"], find_gpu("H200")


def shape(name: str) -> Architecture:
    return Architecture.from_config(find_config(name)[1], name)


LLAMA = shape("meta-llama/Llama-3.1-8B")
BASE = Settings("lora", 2048, micro_batch=2, checkpointing="none", optimizer="adamw-8bit")


@pytest.mark.parametrize(
    ("model", "gpu", "stack", "changes", "runs"),
    [
        ("meta-llama/Llama-3.1-8B", "H200", OURS, {}, True),
        ("Qwen/Qwen3-8B", "RTX-4090", OURS, {"tuning": "qlora"}, True),
        ("Qwen/Qwen3-8B", "H200", TRL, {}, False),
        ("Qwen/Qwen3-8B", "H200", OURS, {"tuning": "full"}, True),
        ("Qwen/Qwen3-8B", "H200", OURS, {"tuning": "full", "kind": "freeze"}, True),
        ("Qwen/Qwen3-8B", "H200", OURS, {"tuning": "full", "precision": "bf16-mixed"}, True),
        ("Qwen/Qwen3-8B", "H200", OURS, {"kind": "ia3"}, False),
        ("Qwen/Qwen3-8B", "H200", OURS, {"dropout": True}, False),
        ("Qwen/Qwen3-8B", "T4", OURS, {"tuning": "qlora"}, False),
        ("Qwen/Qwen3-30B-A3B", "H200", OURS, {}, False),
        ("google/gemma-3-4b-pt", "H200", OURS, {}, True),
        ("google/gemma-2-9b", "H200", OURS, {}, False),
    ],
)
def test_where_they_run(model, gpu, stack, changes, runs):
    assert stack_on(shape(model), dataclasses.replace(BASE, **changes), stack, find_gpu(gpu)).whole_layers == runs


def test_what_is_kept_is_what_the_kernels_say():
    """The coefficients of the table in ``kernels/decoder_layer.py``, with ranks and heads beside them."""
    text = (Path(finetui.__file__).parent / "kernels" / "decoder_layer.py").read_text(encoding="utf-8")
    row = re.search(r"^all-but-elementwise\s+4 H \+ 4 Q \+ 4 K \+ 4 I\s", text, re.MULTILINE)
    assert row, "the table of decoder_layer.py has changed: planner/fused.py has to follow"
    assert re.search(r"^inputs\s+2 H\s", text, re.MULTILINE)
    small = 2 * 16 * 7
    kept = layer_bytes(LLAMA, 16, 7, "none").kept
    assert kept == 4 * 4096 + 4 * 4096 + 4 * 1024 + 4 * 14336 + small + 4 * 32
    assert layer_bytes(LLAMA, 16, 7, "full").kept == 2 * 4096 + small
    parked = layer_bytes(LLAMA, 16, 7, "offload")
    assert (parked.kept, parked.parked) == (small + 4 * 32, 4 * 4096 + 2 * 4096)


@pytest.mark.parametrize(
    ("checkpointing", "measured_gib", "measured_speed"), [("none", 38.91, 17930), ("offload", 16.47, 14116)]
)
def test_eight_billion_parameters_on_an_h200(checkpointing, measured_gib, measured_speed):
    """Measured at 4 x 2048 tokens (tests/bench/results), when a layer's parked tensors still came back all at once."""
    settings = dataclasses.replace(BASE, micro_batch=4, checkpointing=checkpointing)
    spared = layer_bytes(LLAMA, 16, 7, checkpointing).parked * 4 * 2048 / GIB
    assert peak_memory(LLAMA, settings, OURS, H200).allocated_gib == pytest.approx(measured_gib - spared, rel=0.02)
    assert step_speed(LLAMA, settings, OURS, H200).tokens_per_s == pytest.approx(measured_speed, rel=0.05)


def test_whole_layers_keep_far_less_than_stock_ones():
    assert peak_memory(LLAMA, BASE, OURS, H200).allocated_gib < peak_memory(LLAMA, BASE, TRL, H200).allocated_gib - 10


def test_switched_off_they_change_nothing():
    off = dataclasses.replace(BASE, kernels=False)
    plain = dataclasses.replace(OURS, whole_layers=False)
    assert peak_memory(LLAMA, off, OURS, H200) == peak_memory(LLAMA, BASE, plain, H200)
    assert step_speed(LLAMA, off, OURS, H200) == step_speed(LLAMA, BASE, plain, H200)
    assert step_speed(LLAMA, BASE, OURS, H200).step_s < step_speed(LLAMA, off, OURS, H200).step_s


def test_the_down_projection_is_not_computed_twice():
    full = dataclasses.replace(BASE, checkpointing="full")
    off = dataclasses.replace(full, kernels=False)
    ours, plain = (step_speed(LLAMA, s, OURS, H200).terms["recompute"] for s in (full, off))
    layer = LLAMA.layers[0]
    assert recomputed_weights(LLAMA, layer, "full") == layer.linear_weights - 14336 * 4096
    assert ours < 0.7 * plain


def test_dequantised_weights_of_one_mlp_wait_in_a_buffer():
    qlora = dataclasses.replace(BASE, tuning="qlora", quantization="nf4", checkpointing="full")
    ours = peak_memory(LLAMA, qlora, OURS, H200).terms["buffers"]
    mlp = 2 * sum(module.weight for module in LLAMA.layers[0].mlp) / GIB
    assert mlp < ours < 2 * mlp
