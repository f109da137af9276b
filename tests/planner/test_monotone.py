"""Memory never falls with more tokens, parameters or less sharding: over every method, tuning, strategy and policy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from finetui.planner.architecture import Architecture
from finetui.planner.hardware import find_gpu
from finetui.planner.hub import find_config
from finetui.planner.memory import peak_memory
from finetui.planner.methods import METHODS
from finetui.planner.settings import Settings
from finetui.planner.sharding import STRATEGIES
from finetui.planner.speed import step_speed
from finetui.planner.stacks import STACKS, find_stack

MODELS = (
    "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B", "google/gemma-3-4b-pt", "google/gemma-2-2b", "openai/gpt-oss-20b",
    "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V2-Lite", "microsoft/phi-2", "openai-community/gpt2",
    "tiiuae/falcon-7b", "EleutherAI/pythia-1.4b",
)  # fmt: skip
GPUS = ("T4", "RTX-4090", "A100", "H200", "B200")


@cache
def architecture(name: str) -> Architecture:
    return Architecture.from_config(find_config(name)[1], name)


@st.composite
def runs(draw: st.DrawFn) -> Settings:
    """Any way to run that some program has."""
    tuning = draw(st.sampled_from(["full", "lora", "qlora"]))
    stored = {"full": ["none"], "lora": ["none", "int8", "fp8"], "qlora": ["nf4", "nf4-single", "gptq"]}[tuning]
    precisions = ["bf16", "bf16-mixed", "fp16", "fp32"] if tuning == "full" else ["bf16", "fp16"]
    optimizers = ["adamw", "adamw-8bit", "paged-adamw-8bit", "sgd", "adafactor", "lion", "muon", "galore", "apollo"]
    return Settings(
        tuning=tuning,
        sequence_length=draw(st.integers(8, 16384)),
        micro_batch=draw(st.integers(1, 16)),
        accumulation=draw(st.integers(1, 8)),
        rank=draw(st.integers(1, 256)),
        dropout=draw(st.booleans()),
        dora=tuning != "full" and draw(st.booleans()),
        quantization=draw(st.sampled_from(stored)),
        precision=draw(st.sampled_from(precisions)),
        optimizer=draw(st.sampled_from(optimizers)),
        checkpointing=draw(st.sampled_from(["none", "selective", "offload", "full"])),
        kept_layers=draw(st.integers(0, 40)),
        keeps_outputs=draw(st.booleans()),
        attention=draw(st.sampled_from(["sdpa", "eager", "flash"])),
        world_size=draw(st.integers(1, 16)),
        strategy=draw(st.sampled_from([name for name in STRATEGIES if name != "single"])),
        offload=draw(st.sampled_from(["none", "optimizer", "parameters"])),
        kernels=draw(st.booleans()),
        graphs=draw(st.booleans()),
        method=draw(st.sampled_from(sorted(METHODS))),
        optimizer_in_backward=draw(st.booleans()),
        masked=draw(st.booleans()),
    )


@settings(max_examples=250, deadline=None)
@given(
    runs(), st.sampled_from(sorted(STACKS)), st.sampled_from(MODELS), st.sampled_from(GPUS), st.integers(1, 512),
    st.integers(1, 8),
)  # fmt: skip
def test_memory_never_falls(run, framework, model, gpu, more, fewer):
    stack, card, shape = find_stack(framework), find_gpu(gpu), architecture(model)

    def need(**changes) -> float:
        memory = peak_memory(shape, replace(run, **changes), stack, card)
        assert min(memory.terms.values()) >= 0
        assert memory.low_gib <= memory.device_gib <= memory.high_gib
        assert memory.allocated_gib <= memory.reserved_gib <= memory.device_gib
        return memory.device_gib

    least = need() - 1e-9
    assert need(sequence_length=run.sequence_length + more) >= least
    assert need(micro_batch=run.micro_batch + fewer) >= least
    assert need(rank=run.rank + more) >= least
    if run.sharing.optimizer and run.world_size - fewer >= 2:
        assert need(world_size=run.world_size - fewer) >= least
    if run.checkpointing == "full":
        assert need(keeps_outputs=True) >= need(keeps_outputs=False) - 1e-9


@settings(max_examples=120, deadline=None)
@given(
    runs(), st.sampled_from(sorted(STACKS)), st.integers(1, 40), st.integers(1, 6), st.integers(1, 64),
    st.sampled_from(["llama", "qwen3_moe"]),
)  # fmt: skip
def test_memory_never_falls_with_parameters(run, framework, layers, deeper, wider, kind):
    def need(layers: int, inner: int, experts: int = 8) -> float:
        shapes = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512, "head_dim": 16}
        moe = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": inner}
        shape = Architecture.from_config(
            {"model_type": kind, **shapes, **moe, "num_hidden_layers": layers, "intermediate_size": inner}
        )
        return peak_memory(shape, run, find_stack(framework), find_gpu("H200")).device_gib

    least = need(layers, 128) - 1e-9
    assert need(layers + deeper, 128) >= least
    assert need(layers, 128 + wider) >= least
    assert need(layers, 128, 8 + deeper) >= least


@settings(max_examples=120, deadline=None)
@given(runs(), st.sampled_from(sorted(STACKS)), st.sampled_from(MODELS), st.sampled_from(GPUS), st.integers(1, 8))
def test_a_step_never_gets_shorter_with_more_to_do(run, framework, model, gpu, more):
    stack, card, shape = find_stack(framework), find_gpu(gpu), architecture(model)

    def takes(**changes) -> float:
        speed = step_speed(shape, replace(run, **changes), stack, card)
        assert min(speed.terms.values()) >= 0
        assert 0 < speed.mfu < 1
        return speed.step_s

    least = takes() - 1e-9
    assert takes(micro_batch=run.micro_batch + more) >= least
    assert takes(accumulation=run.accumulation + more) >= least
    if run.checkpointing == "none":
        assert takes(checkpointing="full") >= least
