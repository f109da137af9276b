"""Rows of measured runs in many spellings: each is read as what it says, or refused for what it leaves open."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import finetui

sys.path.insert(0, str(Path(finetui.__file__).parent))
measured = importlib.import_module("tests.bench.measured")
accuracy = importlib.import_module("tests.bench.planner_accuracy")
sys.path.pop(0)

ROW = {
    "source": "github.com/someone/runs README.md", "model": "meta-llama/Llama-3.1-8B", "method": "lora",
    "gpu": "A100-80GB", "num_gpus": "1", "seq_len": "4096", "micro_batch": "2", "grad_ckpt": "yes",
    "flash_or_sdpa": "sdpa", "optimizer": "adamw_torch", "lora_r": "16", "targets": "all-linear",
    "framework": "HF Trainer + PEFT", "fused": "none", "measured_peak_gb": "20", "measured_tokens_per_s": "",
    "notes": "metric=torch max_memory_allocated (GiB)",
}  # fmt: skip
FULL = {"method": "full", "lora_r": "", "targets": "all"}


def ask(**changes: str):
    return measured.question(accuracy._Row({**ROW, **changes}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # methods and tunings
        ({"method": "DPO LoRA"}, {"method": "dpo", "tuning": "lora"}),
        ({"method": "dpo (qlora-nf4)"}, {"method": "dpo", "tuning": "qlora", "quantization": "nf4-single"}),
        ({"method": "KTO + LoRA"}, {"method": "kto"}),
        ({"method": "ORPO full", **FULL} | {"method": "ORPO full"}, {"method": "orpo", "tuning": "full"}),
        ({"method": "simpo lora"}, {"method": "simpo"}),
        ({"method": "GRPO lora"}, {"method": "grpo"}),
        ({"method": "rloo-lora"}, {"method": "rloo"}),
        ({"method": "reward model lora"}, {"method": "reward"}),
        ({"method": "DPO"}, {"method": "dpo", "tuning": "lora"}),
        ({"method": "DPO", "lora_r": ""}, {"method": "dpo", "tuning": "full"}),
        ({"method": "sft", "lora_r": ""}, {"tuning": "full"}),
        ({"method": "full-parameter", "lora_r": ""}, {"tuning": "full"}),
        ({"method": "continued pretraining (full)", "lora_r": ""}, {"method": "pretrain", "tuning": "full"}),
        ({"method": "GaLore", "optimizer": "galore_adamw", "lora_r": ""}, {"tuning": "full", "optimizer": "galore"}),
        ({"method": "full + APOLLO", "lora_r": ""}, {"optimizer": "apollo"}),
        ({"method": "loha"}, {"kind": "loha", "tuning": "lora"}),
        ({"method": "LoKr"}, {"kind": "lokr"}),
        ({"method": "prompt_tuning", "lora_r": ""}, {"kind": "prompt"}),
        ({"method": "prefixtuning", "lora_r": ""}, {"kind": "prefix"}),
        ({"method": "boft", "notes": "trainable=1,234,567"}, {"kind": "boft", "trained": 1234567}),
        ({"method": "fourierft", "notes": "trainable=28000"}, {"kind": "fourierft", "trained": 28000}),
        ({"method": "vblora"}, {"kind": "vblora"}),
        ({"method": "randlora"}, {"kind": "randlora"}),
        ({"method": "ln_tuning", "lora_r": "", "notes": "trainable=266240"}, {"kind": "norms"}),
        ({"method": "lora pissa"}, {"kind": "", "tuning": "lora"}),
        ({"method": "qdora"}, {"tuning": "qlora", "dora": True}),
        ({"method": "lora 8bit"}, {"quantization": "int8"}),
        ({"method": "qlora-gptq-int4"}, {"quantization": "gptq"}),
        ({"method": "lora (emb)"}, {"tuning": "lora"}),
        # lengths, counts and ranks
        ({"seq_len": "4k"}, {"sequence_length": 4096}),
        ({"seq_len": "32K packed"}, {"sequence_length": 32768}),
        ({"seq_len": "4,096"}, {"sequence_length": 4096}),
        ({"seq_len": "4096 packed"}, {"sequence_length": 4096}),
        ({"seq_len": "8192 tokens"}, {"sequence_length": 8192}),
        ({"seq_len": "512 + 1024"}, {"sequence_length": 1536}),
        ({"num_gpus": "2x8", "framework": "HF Trainer, DeepSpeed ZeRO-3"}, {"world_size": 16, "strategy": "zero3"}),
        ({"num_gpus": "8 (1 node)", "framework": "TRL + FSDP2"}, {"world_size": 8, "strategy": "fsdp"}),
        ({"micro_batch": "4.0", "lora_r": "64.0"}, {"micro_batch": 4, "rank": 64}),
        ({"notes": "gradient_accumulation_steps=8"}, {"accumulation": 8}),
        # checkpointing
        ({"grad_ckpt": "unsloth", "framework": "Unsloth 2025.3"}, {"checkpointing": "full"}),
        ({"grad_ckpt": "True"}, {"checkpointing": "full"}),
        ({"grad_ckpt": "enabled (non-reentrant)"}, {"checkpointing": "full"}),
        ({"grad_ckpt": "off"}, {"checkpointing": "none"}),
        ({"grad_ckpt": "disabled"}, {"checkpointing": "none"}),
        ({"grad_ckpt": "yes, activation offloading"}, {"checkpointing": "offload"}),
        ({"grad_ckpt": "selective (every 2)"}, {"checkpointing": "selective", "kept_layers": 16}),
        ({"grad_ckpt": "selective layer (every third)"}, {"checkpointing": "selective", "kept_layers": 21}),
        ({"grad_ckpt": "25% of layers"}, {"checkpointing": "selective", "kept_layers": 24}),
        ({"grad_ckpt": "selective (op)"}, {"checkpointing": "full", "keeps_outputs": True}),
        ({"grad_ckpt": "", "framework": "LLaMA-Factory"}, {"checkpointing": "full"}),
        # rows spread over devices
        ({"seq_len": "65536", "num_gpus": "8", "framework": "TRL + FSDP2, context parallel 4"},
         {"sequence_length": 16384}),
        ({"seq_len": "32768", "num_gpus": "8", "framework": "ms-swift ZeRO-3 + sequence_parallel_size=2"},
         {"sequence_length": 16384}),
        # optimisers
        ({"optimizer": "paged_adamw_32bit"}, {"optimizer": "paged-adamw"}),
        ({"optimizer": "adamw_bnb_8bit"}, {"optimizer": "adamw-8bit"}),
        ({"optimizer": "PagedAdamW8bit"}, {"optimizer": "paged-adamw-8bit"}),
        ({**FULL, "optimizer": "Muon"}, {"optimizer": "muon"}),
        ({**FULL, "optimizer": "Adafactor"}, {"optimizer": "adafactor"}),
        ({**FULL, "optimizer": "lion_8bit"}, {"optimizer": "lion-8bit"}),
        ({**FULL, "optimizer": "torchao AdamW4bit"}, {"optimizer": "adamw-4bit"}),
        ({**FULL, "optimizer": "LOMO"}, {"optimizer": "sgd", "optimizer_in_backward": True}),
        # sharing and offloading
        ({**FULL, "num_gpus": "8", "framework": "DeepSpeed ZeRO stage 2 + CPU optimizer offload"},
         {"strategy": "zero2"}),
        ({**FULL, "num_gpus": "4", "framework": "HF Trainer + ZeRO-Infinity"},
         {"strategy": "zero3", "offload": "parameters"}),
        ({"num_gpus": "8", "framework": "PyTorch fully sharded data parallel"}, {"strategy": "fsdp"}),
        ({"num_gpus": "2", "framework": "TRL, DDP"}, {"strategy": "ddp"}),
        ({"num_gpus": "2", "framework": "TRL"}, {"strategy": "ddp"}),
        ({**FULL, "num_gpus": "8", "framework": "torchtitan"}, {"strategy": "fsdp", "precision": "bf16-mixed"}),
        # precision and attention
        ({**FULL, "framework": "LLaMA-Factory"}, {"precision": "bf16-mixed"}),
        ({**FULL, "framework": "LLaMA-Factory pure_bf16"}, {"precision": "bf16"}),
        ({**FULL, "framework": "HF Trainer, fp32"}, {"precision": "fp32"}),
        ({"framework": "HF Trainer fp16"}, {"precision": "fp16"}),
        ({"flash_or_sdpa": "eager"}, {"attention": "eager"}),
        ({"flash_or_sdpa": "flash_attention_2"}, {"attention": "flash"}),
        # targets
        ({"targets": "q_proj,k_proj,v_proj"}, {"targets": ("k_proj", "q_proj", "v_proj")}),
        ({"targets": "gate,up,down"}, {"targets": ("down_proj", "gate_proj", "up_proj")}),
        ({"targets": "attention only"}, {"targets": ("k_proj", "o_proj", "q_proj", "v_proj")}),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items())[:60],
)  # fmt: skip
def test_a_row_is_read_as_what_it_says(changes, expected):
    asked = ask(**changes)
    assert {name: getattr(asked.settings, name) for name in expected} == expected
    answer = accuracy.answer(accuracy._Row({**ROW, **changes}), None)
    assert answer.predicted_gib > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"framework": "homemade"}, "framework not known"),
        ({"framework": "Megatron-LM"}, "framework not modelled"),
        ({"framework": "MLX"}, "framework not modelled"),
        ({"method": "mergekit ties"}, "no training"),
        ({"method": "lora-awq"}, "quantisation not modelled"),
        ({"method": "freeze 4 layers"}, "which layers are trained"),
        ({"num_gpus": "2", "framework": "TRL", "model": "Llama-3.1-70B"}, "how they share is not stated"),
        ({"num_gpus": "2", "framework": "TRL", "gpu": "not stated"}, "how they share is not stated"),
        ({"num_gpus": "8", "framework": "TRL + tensor parallel"}, "tensor, pipeline and expert"),
        ({"num_gpus": "many"}, "number of GPUs is not one number"),
        ({"micro_batch": "auto"}, "micro batch is not one number"),
        ({"seq_len": "varied"}, "how long the rows really were"),
        ({"seq_len": "<=2048 short"}, "how long the rows really were"),
        ({"grad_ckpt": "not stated"}, "checkpointing is not stated"),
        ({"grad_ckpt": "selective, attention"}, "which part is checkpointed"),
        ({**FULL, "optimizer": "SOAP"}, "optimiser not modelled"),
        ({"num_gpus": "8", "framework": "TRL + FSDP2, ring attention"}, "over how many devices a row is spread"),
        ({**FULL, "optimizer": "my own"}, "the optimiser is not known"),
        ({"model": "acme/unheard-of-7B"}, "no shapes for acme"),
        ({"targets": "the usual ones"}, "adapter targets not known"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value.values())[:40],
)
def test_what_a_row_leaves_open_is_refused_by_name(changes, reason):
    with pytest.raises(measured.Refused, match=reason):
        ask(**changes)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("A100 PCIe 40GB", "A100-40GB-PCIe"), ("A100 40G", "A100-40GB"),
        ("8x H100-80GB", "H100"), ("H100 SXM5 80GB", "H100"), ("H100 PCIe", "H100-PCIe"), ("L40S", "L40S"),
        ("RTX A6000", "RTX-A6000"), ("RTX A6000 48GB", "RTX-A6000"), ("Tesla T4 (Colab)", "T4"),
        ("V100-32GB", "V100-32GB"), ("V100 16GB", "V100-16GB"), ("RTX3090", "RTX-3090"),
        ("RTX 3090 (280W)", "RTX-3090"),
        ("GeForce RTX 4090 24GB", "RTX-4090"), ("AMD MI300X", "MI300X"), ("H200 141GB", "H200"), ("A10G-24GB", "A10G"),
        ("B200", "B200"), ("1x A100 (40GB)", "A100-40GB"), ("Colab T4", "T4"), ("RTX 3090 Ti", "RTX-3090-Ti"),
        ("Quadro RTX 8000", "RTX-8000"), ("L20", "L20"), ("RTX 3080 10GB", "RTX-3080"),
    ],
)  # fmt: skip
def test_gpus_are_known_by_many_names(spelling, name):
    asked = ask(gpu=spelling)
    assert asked.gpu.name == name
    assert asked.times


def test_memory_is_answered_and_speed_is_not_where_no_gpu_is_named():
    asked = ask(gpu="Apple M2 Ultra")
    assert not asked.times


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Llama 3.1 8B Instruct", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "meta-llama/Llama-3.1-8B"),
        ("llama2-13b", "meta-llama/Llama-2-13b-hf"), ("TheBloke/Llama-2-70B-GPTQ", "meta-llama/Llama-2-70b-hf"),
        ("NousResearch/Llama-2-70b-hf", "meta-llama/Llama-2-70b-hf"), ("Llama-3-70B", "meta-llama/Meta-Llama-3-70B"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("Mistral 7B", "mistralai/Mistral-7B-v0.1"),
        ("Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"), ("gemma-2-9b-it", "google/gemma-2-9b"), ("MPT-7b", "MPT-7b"),
        ("Qwen/Qwen-7B-Chat", "Qwen/Qwen-7B-Chat"), ("Qwen2-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("Qwen/QwQ-32B", "Qwen/Qwen2.5-32B"), ("DeepSeek-R1-Distill-Llama-70B", "meta-llama/Llama-3.1-70B"),
        ("teknium/OpenHermes-2.5-Mistral-7B", "mistralai/Mistral-7B-v0.1"), ("LLaMA-33B", "huggyllama/llama-30b"),
        ("EleutherAI/pythia-12b-deduped", "EleutherAI/pythia-12b"), ("bloomz-7b1-mt", "bigscience/bloomz-7b1"),
        ("tiiuae/falcon-40b-instruct", "tiiuae/falcon-40b"), ("CodeLlama-34b-Instruct", "codellama/CodeLlama-34b-hf"),
        ("google/gemma-4-26B-A4B-it", "google/gemma-4-26B-A4B"), ("01-ai/Yi-34B-Chat", "01-ai/Yi-34B"),
    ],
)  # fmt: skip
def test_models_are_known_by_many_names(spelling, name):
    assert ask(model=spelling).architecture.name == name


def test_a_bound_on_the_length_widens_the_interval_and_leaves_speed_out():
    bound, exact = ask(seq_len="max 2048"), ask(seq_len="2048")
    assert bound.settings.sequence_length == exact.settings.sequence_length == 2048
    assert "length" in bound.unknown
    assert "length" not in exact.unknown
    assert not bound.times


def test_rows_of_any_length_are_a_bound():
    assert "length" in ask(notes="sample_packing=false").unknown
    assert "length" not in ask(notes="sample_packing=true").unknown


def test_a_row_spread_over_devices_has_memory_and_no_speed():
    spread = {"num_gpus": "8", "framework": "TRL + FSDP2, context parallel 4", "seq_len": "65536"}
    assert not ask(**spread).times


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"framework": "HF Trainer", "notes": "peft 0.10"}, {"adapter_bytes": 2, "casts_inputs": False}),
        ({"framework": "HF Trainer", "notes": "peft 0.13.2"}, {"adapter_bytes": 4, "casts_inputs": True}),
        ({"framework": "ms-swift HF, expandable_segments"}, {"expandable_segments": True}),
        ({"framework": "torchtitan FSDP2"}, {"expandable_segments": True, "stock_model": False}),
        ({"framework": "LLaMA-Factory"}, {"adapter_bytes_4bit": 4}),
        ({"framework": "TRL", "notes": "trl 1.16"}, {"loss": "tiles"}),
        ({"framework": "TRL", "notes": "trl0.13 tf4.48"}, {"loss": "logits", "logit_backward": 14.0}),
        ({"framework": "TRL 0.17", "method": "dpo lora"}, {"loss": "logits", "logit_backward": 8.0}),
        ({"framework": "fms-fsdp"}, {"stock_model": False, "kbit_upcast": False}),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items())[:60],
)
def test_versions_and_allocators_make_the_stack(changes, expected):
    stack = ask(**changes).stack
    assert {name: getattr(stack, name) for name in expected} == expected


def test_what_finished_on_a_card_held_no_more_than_it_has():
    long = {"seq_len": "8192", "micro_batch": "2", "grad_ckpt": "no", "measured_tokens_per_s": ""}
    small, large = ({**ROW, **long, "gpu": gpu} for gpu in ("RTX 4090", "H200"))
    predicted = [accuracy.answer(accuracy._Row(row), None).predicted_gib for row in (small, large)]
    assert predicted[0] < 24 < predicted[1]
    named = {**ROW, **long, "gpu": "H100 (96GB)", "notes": "nvidia-smi"}
    assert ask(gpu=named["gpu"]).most_gib == 96


def test_vllm_takes_its_share_of_the_card_unless_it_sleeps():
    grpo = {"method": "grpo lora", "framework": "TRL", "seq_len": "512 + 1024", "gpu": "H100"}
    need = {}
    for notes in ("", "vllm colocate", "vllm_gpu_memory_utilization=0.5", "vllm colocate, sleep", "vllm server"):
        row = accuracy._Row({**ROW, **grpo, "notes": f"{notes}; metric=nvidia-smi"})
        need[notes] = accuracy.answer(row, None).predicted_gib
    alone = need[""]
    assert need["vllm colocate"] == pytest.approx(alone + 0.3 * 79.11)
    assert need["vllm_gpu_memory_utilization=0.5"] == pytest.approx(alone + 0.5 * 79.11)
    assert need["vllm colocate, sleep"] == need["vllm server"] == alone
    assert ask(**grpo).settings.beside.completion == 1024


def test_further_shapes_have_the_counts_of_their_names():
    names = importlib.import_module("tests.bench.measured_names")
    for name, billions in (
        ("huggyllama/llama-65b", 65.286), ("01-ai/Yi-34B", 34.389), ("EleutherAI/gpt-neox-20b", 20.555),
        ("bigscience/bloom", 176.247), ("google/gemma-4-26B-A4B", 25.233), ("mistralai/Codestral-22B-v0.1", 22.247),
    ):  # fmt: skip
        shape = names.architecture_of(name, None)
        assert shape.exact
        assert round(shape.parameters / 1e9, 3) == billions
