"""Rows of measured runs in many spellings: each is read as what it says, or refused for what it leaves open."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import finetui
from finetui.planner.memory import peak_memory
from finetui.planner.stacks import STACKS

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
        # what is left open or named otherwise
        ({"num_gpus": "4 x A100", "framework": "TRL + FSDP"}, {"world_size": 4}),
        ({"num_gpus": "single"}, {"world_size": 1}),
        ({"micro_batch": "bs=4"}, {"micro_batch": 4}),
        ({"method": "adamss"}, {"tuning": "lora"}),
        ({"method": "classification", "lora_r": ""}, {"tuning": "full"}),
        ({"method": "qlora-awq"}, {"quantization": "gptq"}),
        ({"method": "adapter_v2", "notes": "trainable=4,279,744"}, {"kind": "adapter-v2", "trained": 4279744}),
        ({**FULL, "optimizer": "came_pytorch"}, {"optimizer": "came"}),
        ({**FULL, "optimizer": "my own"}, {"optimizer": "adamw"}),
        ({"method": "prompt_tuning", "lora_r": "", "notes": "trainable=819200"}, {"sequence_length": 4096 + 200}),
        ({"targets": "PEFT default"}, {"targets": ("q_proj", "v_proj")}),
        ({"targets": "query_key_value"}, {"targets": ("k_proj", "q_proj", "v_proj")}),
        ({"targets": "the usual ones"}, {"targets": "all-linear"}),
        ({"grad_ckpt": "every layer"}, {"checkpointing": "full"}),
        ({"grad_ckpt": "not stated"}, {"checkpointing": "full"}),
        ({"grad_ckpt": "selective"}, {"keeps_outputs": True}),
        ({"seq_len": "<=2048 short"}, {"sequence_length": 600}),
        ({**FULL, "framework": "HF Trainer, DeepSpeed ZeRO-3"}, {"world_size": 1, "strategy": "zero3"}),
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
        ({"framework": "Megatron-LM"}, "framework not modelled"),
        ({"framework": "MLX"}, "framework not modelled"),
        ({"method": "mergekit ties"}, "no training"),
        ({"method": "lora-aqlm"}, "quantisation not modelled"),
        ({"method": "freeze 4 layers"}, "which layers are trained"),
        ({"num_gpus": "2", "framework": "TRL", "model": "Llama-3.1-70B"}, "how they share is not stated"),
        ({"num_gpus": "2", "framework": "TRL", "gpu": "not stated"}, "how they share is not stated"),
        ({"num_gpus": "8", "framework": "TRL + tensor parallel"}, "tensor, pipeline and expert"),
        ({"num_gpus": "many"}, "number of GPUs is not one number"),
        ({"micro_batch": "auto"}, "micro batch is not one number"),
        ({"seq_len": "varied"}, "how long the rows really were"),
        ({"seq_len": "<=2048 unpacked"}, "how long the rows really were"),
        ({"grad_ckpt": "selective, attention"}, "which part is checkpointed"),
        ({**FULL, "optimizer": "SOAP"}, "optimiser not modelled"),
        ({"num_gpus": "8", "framework": "TRL + FSDP2, ring attention"}, "over how many devices a row is spread"),
        ({"model": "acme/unheard-of"}, "no shapes for acme"),
        ({"model": "acme/unheard-of-30B-A3B"}, "no shapes for acme"),
        ({"model": "google-t5/t5-3b"}, "no shapes for google-t5"),
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


@pytest.mark.parametrize(
    ("text", "gib"),
    [("20", 20), ("~20 GB", 20), ("20.5 GiB", 20.5), ("20,480 MiB", 20), ("15-16", 15.5), ("20.1 (max)", 20.1),
     ("", 0), ("n/a", 0)],
)  # fmt: skip
def test_figures_are_read_with_their_units(text, gib):
    assert accuracy._number(text) == pytest.approx(gib)


@pytest.mark.parametrize("text", ["OOM", "<24", "1.2.3"])
def test_what_is_no_figure_is_refused(text):
    with pytest.raises(measured.Refused, match="not one number"):
        accuracy._number(text)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"framework": "homemade"}, "program"),
        ({"grad_ckpt": "unknown"}, "checkpointing"),
        ({"model": "acme/unheard-of-7B"}, "shapes"),
        ({"seq_len": "<=2048 short"}, "short"),
        ({"micro_batch": ""}, "batch"),
    ],
)
def test_what_a_row_leaves_open_widens_its_interval(changes, name):
    open_, told = ask(**changes), ask()
    assert name in open_.unknown
    assert name not in told.unknown


@pytest.mark.parametrize("billions", [0.3, 1.1, 3, 7, 11, 20, 33, 70])
def test_a_size_in_a_name_makes_a_decoder_of_that_size(billions):
    found = ask(model=f"acme/unheard-of-{billions}B-chat").architecture
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.12)


def test_experts_of_transformers_4_are_quantised_like_any_linear():
    """Mixtral 8x7B in NF4 held 22.97 GiB on transformers 4.48, all of it sharded; on 5 its experts stay in 16 bits."""
    row = {"model": "mistralai/Mixtral-8x7B-v0.1", "method": "qlora-nf4-dq", "targets": "q,k,v,o"}
    old, new = (ask(**row, framework=f"HF Trainer, transformers {version}") for version in ("4.48", "5.2"))
    held = {name: peak_memory(q.architecture, q.settings, q.stack, q.gpu).terms["weights"] for name, q in
            (("old", old), ("new", new))}  # fmt: skip
    assert held["old"] == pytest.approx(22.9, rel=0.05)
    assert held["new"] > 80
    two = {**row, "num_gpus": "2", "framework": "HF Trainer + FSDP, transformers 4.48"}
    halved = ask(**two)
    terms = peak_memory(halved.architecture, halved.settings, halved.stack, halved.gpu).terms
    assert terms["weights"] == pytest.approx(held["old"] / 2, rel=0.03)


def test_modules_trained_whole_keep_the_width_of_the_base():
    saved = ask(method="lora (emb)")
    plain = ask(method="lora")
    more = {
        name: peak_memory(saved.architecture, saved.settings, stack, saved.gpu).terms["adapter"]
        - peak_memory(plain.architecture, plain.settings, stack, plain.gpu).terms["adapter"]
        for name, stack in (("transformers", STACKS["transformers"]), ("finetui", STACKS["finetui"]))
    }
    table = 2 * saved.architecture.vocab * saved.architecture.hidden / 2**30
    assert more["transformers"] == pytest.approx(2 * table, rel=0.01)
    assert more["finetui"] == pytest.approx(4 * table, rel=0.01)


def test_models_with_a_loss_of_their_own_keep_logits_as_they_are():
    """gpt_bigcode on transformers 4.48: 8 bytes a logit in 16 bits, 18 under autocast; Mistral's is the library's."""
    row = {"model": "bigcode/starcoder", "framework": "HF Trainer/TRL (fms-hf-tuning)", "notes": "tf4.48.1 peft0.13"}
    assert ask(**row, **FULL).stack.logit_backward == 8.0
    assert ask(**row, method="qlora-nf4").stack.logit_backward == 18.0
    assert ask(**{**row, "model": "mistralai/Mistral-7B-v0.1"}, **FULL).stack.logit_backward == 14.0


def test_a_network_that_nobody_names_leaves_speed_out():
    shared = {"num_gpus": "4", "framework": "HF Trainer + DeepSpeed ZeRO-2"}
    assert ask(**shared).times
    assert not ask(**shared, notes="multi-node, 2x2").times


def test_quantised_models_come_to_fsdp2_whole():
    row = {"method": "qlora-nf4", "num_gpus": "2", "seq_len": "512", "micro_batch": "1"}
    one, two = ask(**row, framework="axolotl + FSDP"), ask(**row, framework="axolotl + FSDP2")
    assert one.loading_gib == 0
    alone = ask(method="qlora-nf4", framework="axolotl")
    whole = peak_memory(alone.architecture, alone.settings, alone.stack, alone.gpu).terms["weights"]
    assert two.loading_gib == pytest.approx(1.5 * whole, rel=0.01)
    answer = accuracy.answer(accuracy._Row({**ROW, **row, "framework": "axolotl + FSDP2"}), None)
    assert answer.predicted_gib >= two.loading_gib
