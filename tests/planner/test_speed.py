"""Time of a step: attention against published kernels, and the host that can't start kernels fast enough."""

from __future__ import annotations

from functools import cache

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import find_gpu, load_catalog
from finetui.planner.hub import find_config
from finetui.planner.settings import Settings
from finetui.planner.speed import step_speed
from finetui.planner.stacks import STACKS
from finetui.planner.traffic import launches
from finetui.planner.work import _attention_rate


@cache
def architecture(name: str) -> Architecture:
    return Architecture.from_config(find_config(name)[1], name)


@pytest.mark.parametrize(
    ("gpu", "span", "recent", "tflops"),
    [
        ("A100", 1024, False, 133), ("A100", 2048, False, 157), ("A100", 16384, False, 188),  # arXiv:2307.08691
        ("H200", 2048, True, 401), ("H200", 8192, True, 492),  # measured
    ],
)  # fmt: skip
def test_attention_runs_as_fast_as_was_published(gpu, span, recent, tflops):
    assert _attention_rate(find_gpu(gpu), span, 128, recent=recent) / 1e12 == pytest.approx(tflops, rel=0.05)


def test_attention_never_outruns_products():
    for gpu in load_catalog().values():
        for recent in (False, True):
            assert 0 < _attention_rate(gpu, 65536, 128, recent=recent) <= gpu.achievable * gpu.bf16_tflops * 1e12


@pytest.mark.parametrize("gpu", ["RTX-3090", "RTX-4090", "RTX-5090", "H20"])
def test_narrow_matrix_units_are_nearly_all_that_attention_waits_for(gpu):
    gpu = find_gpu(gpu)
    products = gpu.achievable * gpu.bf16_tflops * 1e12
    assert _attention_rate(gpu, 65536, 128, recent=False) > 0.85 * products


def test_small_batches_wait_for_the_host():
    """A 0.6B model's step over 128 tokens takes as long as over 64: Python starts as many kernels."""
    small, gpu = architecture("Qwen/Qwen3-0.6B"), find_gpu("H100")
    times = [step_speed(small, Settings("lora", length), STACKS["trl"], gpu).step_s for length in (64, 128)]
    assert times[1] == pytest.approx(times[0], rel=0.02)
    assert step_speed(small, Settings("lora", 64), STACKS["trl"], gpu).terms["launch"] > 0.5 * times[0]
    whole = step_speed(small, Settings("lora", 64, graphs=True), STACKS["finetui"], gpu)
    assert whole.step_s < 0.5 * times[0]  # replayed, nothing waits


def test_layers_launch_as_many_kernels_as_were_counted():
    """transformers 5.23 and peft 0.21 on Llama: 38 and 71 operations a layer, with seven pairs 94 and 130."""
    llama, stack = architecture("meta-llama/Llama-3.1-8B"), STACKS["transformers"]
    for tuning, checkpointing, ahead, behind in (
        ("full", "none", 38, 71), ("lora", "none", 94, 130), ("lora", "full", 184, 130),
    ):  # fmt: skip
        counted = launches(llama, Settings(tuning, 1024, checkpointing=checkpointing), stack)
        started = (counted.forward + counted.again, counted.backward)
        assert [n / 32 for n in started] == pytest.approx([ahead, behind], rel=0.15)


def test_every_expert_of_llama_4_runs_over_every_token():
    """``Llama4TextMoe`` weighs what was not chosen by 0, and multiplies with it all the same."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    shape = {
        "model_type": "llama4_text", "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
        "num_local_experts": 8, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
    }  # fmt: skip
    rows = []
    block = modeling.Llama4TextMoe(modeling.Llama4TextConfig(**shape))
    block.experts.register_forward_hook(lambda module, taken, made: rows.append(made.numel() // 32))
    with torch.no_grad():
        block(torch.zeros(1, 5, 32))
    (layer,) = Architecture.from_config(shape, "llama-4").layers
    assert rows == [5 * layer.experts_per_token] == [5 * 8]
    assert layer.run_weights == layer.expert_weights == 8 * layer.active_weights
    routed = Architecture.from_config({**shape, "model_type": "mixtral"}, "mixtral").layers[0]
    assert routed.experts_per_token == 1
    assert routed.run_weights == routed.active_weights
