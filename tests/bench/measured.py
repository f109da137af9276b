"""Reads a row of a table of measured runs as a question to the planner, or says why it can't be one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from finetui.planner.architecture import Architecture
from finetui.planner.errors import UserError
from finetui.planner.hardware import Gpu, find_gpu
from finetui.planner.hub import find_config, known_models
from finetui.planner.options import TuningOptions
from finetui.planner.settings import Settings
from finetui.planner.stacks import STACKS, Stack

CONFIGS = Path(__file__).parent / "data" / "configs"

#: transformers up to 4.48 as fms-acceleration ran it: the loss copies its shifted logits (14 B per logit in all), AdamW
#: is the foreach series (torch 2.4), and the model's own forward runs under autocast.
_TRANSFORMERS_4 = replace(
    STACKS["transformers"], logit_forward=14.0, logit_backward=14.0, fused_optimizer=False, kbit_upcast=True
)
#: The fast kernels of the same repository: fused cross-entropy over 16-bit logits, fused norms and rotary embedding.
_FOAK = replace(_TRANSFORMERS_4, logit_forward=8.1, logit_backward=8.1, fused_norm=True, kbit_upcast=False)
_FLCE = {"loss": "chunks", "logit_forward": 8.0, "logit_backward": 8.0}
#: Cut Cross-Entropy makes no logits at all; its blocks are smaller than a chunk of Liger's (arXiv:2411.09009).
_CCE = {"loss": "chunks", "logit_forward": 4.0, "logit_backward": 4.0, "chunk_tokens": 128}
_LIGER = {**_FLCE, "fused_norm": True, "fused_mlp": True}
_COMPILED = {"fused_norm": True, "fused_mlp": True, "compiled": True}
_PLAIN = replace(STACKS["transformers"], autocast=False, fused_optimizer=False)
#: Qwen's remote code keeps 16-bit logits, a shifted copy and their log-softmax; DeepSpeed casts adapters to 16 bits.
_QWEN_1 = replace(
    STACKS["transformers"], logit_forward=6.0, logit_backward=8.0, kbit_upcast=False, adapter_bytes=2,
    adapter_bytes_4bit=2, casts_inputs=False, fused_norm=True, fused_optimizer=False, certain=False,
)  # fmt: skip

#: Its scripts of 2023 run the longest row first, so nothing of an earlier step is as large.
_LIT_GPT = replace(STACKS["litgpt"], logit_held=8.0, keeps_packed_inputs=1)

#: Part of the framework's name, in lower case and the order they are looked for, to what it runs.
_FRAMEWORKS: tuple[tuple[str, Stack], ...] = (
    ("unsloth", STACKS["unsloth"]),
    ("axolotl", STACKS["axolotl"]),
    ("torchtune", STACKS["torchtune"]),
    ("fsdp_qlora", STACKS["fsdp-qlora"]),
    ("llm-foundry", STACKS["llm-foundry"]),
    ("lit-gpt", _LIT_GPT),
    ("litgpt", STACKS["litgpt"]),
    ("fms", _TRANSFORMERS_4),
    ("remote-code qwen", _QWEN_1),
    ("ms-swift", STACKS["ms-swift"]),
    ("llama-factory", STACKS["llama-factory"]),
    ("llamafactory", STACKS["llama-factory"]),
    ("peft, plain loop", _PLAIN),
    ("finetui", STACKS["finetui"]),
    ("trl", STACKS["trl"]),
    ("transformers", STACKS["transformers"]),
    ("hf trainer", STACKS["transformers"]),
)
#: How several devices share, by what the row says of it.
_STRATEGIES = (
    (r"zero-?3", "zero3"), (r"zero-?2", "zero2"), (r"zero-?1", "zero1"), (r"no_shard|\bddp\b", "ddp"),
    (r"shard_grad_op", "shard-grad-op"), (r"full_shard|fsdp", "fsdp"),
)  # fmt: skip
_MODULES = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v", "o": "o", "projection": "o"}
_SIDES = {
    "q": ("q_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv"),
    "k": ("k_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv"),
    "v": ("v_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv"),
    "o": ("o_proj", "dense", "out_proj", "c_proj"),
}
_ALIASES = {
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B", "tiny-llama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf", "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    # Tuned from these, and so of their shapes.
    "mistralai/magistral-small-2506": "mistralai/Mistral-Small-24B-Base-2501",
    "katanemo/plano-orchestrator-4b": "Qwen/Qwen3-4B",
}  # fmt: skip


class Refused(Exception):
    """A row that can't be answered; its text is the reason."""


@dataclass(frozen=True)
class Question:
    """What a row asks. ``unknown`` names what it leaves open, each of which widens the interval."""

    architecture: Architecture
    settings: Settings
    stack: Stack
    gpu: Gpu
    metric: str
    """``allocated``, ``reserved`` or ``device``."""
    unknown: tuple[str, ...]
    times: bool
    """Whether the row is complete enough for speed."""


def question(row: dict[str, str], configs: Path | None = None) -> Question:
    """Read one row.

    Raises:
        Refused: the model, a setting, the framework or how devices share is not known or not stated.
    """
    text = " ".join((row["framework"], row["method"], row["notes"])).lower()
    unknown: list[str] = []
    architecture = _architecture(row["model"], configs)
    settings = _settings(row, text, architecture, unknown)
    stack = _stack(row)
    if "compile=yes" in row["framework"] or "compile on" in row["framework"]:
        unknown.append("compiled")
    metric = _metric(row["notes"], unknown)
    gpu = _gpu(row["gpu"])  # memory hardly depends on it, speed does
    times = gpu is not None and "length" not in unknown
    return Question(architecture, settings, stack, gpu or find_gpu("A100"), metric, tuple(unknown), times)


def _stack(row: dict[str, str]) -> Stack:
    name, fused = row["framework"].lower(), row["fused"].strip().lower()
    found = next((stack for part, stack in _FRAMEWORKS if part in name), None)
    if found is None:
        raise Refused(f"framework not known: {row['framework'].split(',')[0]}")
    if found is _TRANSFORMERS_4:
        base = _FOAK if "foak" in fused or fused == "liger" else found
        plain = "accelerated" in fused or "gptq" in row["method"].lower()  # PEFT upcasts nothing beside GPTQ weights
        base = replace(base, kbit_upcast=base.kbit_upcast and not plain, unpacks_in_kernel="accelerated" in fused)
        return replace(base, **_FLCE) if "liger" in fused or "flce" in fused else base
    if found.name == "torchtune":
        compiled = "compile=yes" in name or "compile on" in name or "compile" in fused
        found = replace(found, **_COMPILED) if compiled else found
        if fused == "full":  # the head's output is upcast as a whole; compiled, its copies are folded
            width = 10.0 if compiled else 14.0
            return replace(found, logit_forward=width, logit_backward=width)
        # Compiled, the fp32 copies of a chunk are folded into one kernel: 16-bit logits, and a chunk's gradient.
        return replace(found, logit_forward=2.25, logit_backward=2.25) if compiled else found
    if "cutcross" in fused or "cce" in fused.split():
        return replace(found, **_CCE)
    if "liger" in fused:
        return STACKS["trl-liger"] if found.name == "trl" else replace(found, **_LIGER)
    return found


@cache
def _folder(configs: Path) -> dict[str, Path]:
    """Every config.json of a folder by its model's full name and by its last part, in lower case."""
    names: dict[str, Path] = {}
    for path in sorted(configs.glob("*/config.json")):
        full = path.parent.name.replace("--", "/").lower()
        names.setdefault(full.rsplit("/", 1)[-1], path)
        names[full] = path
    return names


def _architecture(model: str, configs: Path | None) -> Architecture:
    wanted = [model.lower(), _ALIASES.get(model.lower(), model).lower(), model.lower().rsplit("/", 1)[-1]]
    for folder in filter(None, (configs, CONFIGS)):
        path = next((found for name in wanted if (found := _folder(folder).get(name))), None)
        if path:
            return _read(path, model)
    shipped = {name.split("/")[-1].lower(): name for name, _ in known_models().values()}
    tails = {**shipped, **{tail.removesuffix("-hf"): name for tail, name in shipped.items()}}
    for name in wanted:
        known = known_models().get(name, (tails.get(name.rsplit("/", 1)[-1]), None))[0]
        if known:
            return Architecture.from_config(find_config(known)[1], known)
    raise Refused(f"no shapes for {model}: give its config.json with --configs")


@cache
def _read(path: Path, model: str) -> Architecture:
    try:
        return Architecture.from_config(json.loads(path.read_text(encoding="utf-8")), model)
    except UserError as error:
        raise Refused(f"{model}: {error.what}") from None


def _gpu(name: str) -> Gpu | None:
    plain = re.sub(r"\s*[(+].*", "", name).strip()
    for candidate in (plain, re.sub(r"[- ]\d+GB$", "", plain)):
        try:
            return find_gpu(candidate)
        except UserError:
            continue
    return None


def _metric(notes: str, unknown: list[str]) -> str:
    stated = re.search(r"metric=([^;]*)", notes)
    text = (stated.group(1) if stated else notes).lower()
    if "nvidia-smi" in text or "nvml" in text:
        return "device"
    if "reserved" in text and "logs reserved/active" not in text:
        return "reserved"
    if not stated or "not stated" in text:
        unknown.append("metric")
        # Figures without a word on it are mostly read off nvidia-smi, unless the framework prints its own.
        return "device" if "not stated" in text and "logs" not in text else "reserved"
    return "allocated"


def _settings(row: dict[str, str], text: str, architecture: Architecture, unknown: list[str]) -> Settings:
    tuning, quantization = _tuning(row["method"])
    world = _whole(row["num_gpus"] or "1", "number of GPUs")
    targets = _targets(row["targets"], architecture) if tuning != "full" else "all-linear"
    checkpoint, optimizer = row["grad_ckpt"].lower(), row["optimizer"].lower()
    if "calls them estimates" in text:
        raise Refused("the source calls its figures estimates")
    if "yaml devices=1" in checkpoint and world > 1:
        raise Refused("the source runs on one device where the row says several")
    if "unclear" in optimizer or "checkpointing off (not stated)" in text:
        raise Refused("the optimiser or checkpointing is not stated")
    return Settings(
        tuning=tuning,
        sequence_length=_length(row["seq_len"], unknown),
        micro_batch=_whole(row["micro_batch"], "micro batch"),
        accumulation=_accumulation(text),
        dropout=tuning != "full" and bool(re.search(r"lora_dropout=0\.|lit-?gpt", text)),  # 0.05 in LitGPT's scripts
        rank=_rank(row["lora_r"]) if tuning != "full" else 16,
        kind=_kind(row["method"]),
        options=_options(row),
        targets=targets,
        dora="dora" in row["method"].lower(),
        quantization=quantization,
        precision="bf16-mixed" if re.search(r"amp_|zero", text) and tuning == "full" else "bf16",
        optimizer=_optimizer(optimizer),
        optimizer_in_backward=bool(re.search(r"in[ _]b(ack)?w", optimizer)),
        checkpointing="offload" if "offload" in checkpoint else _checkpointing(checkpoint),
        world_size=world,
        # Qwen's script for GPTQ weights on one device runs them under DeepSpeed's ZeRO-2.
        strategy=_strategy(row, text) if world > 1 else "zero2" if quantization == "gptq" and "qwen" in text else "ddp",
        offload="parameters" if "cpu param offload" in text else "none",
    )


def _tuning(method: str) -> tuple[str, str]:
    name = method.lower()
    for other in ("dpo", "grpo", "kto", "orpo", "galore", "loha", "lokr", "boft"):
        if re.search(rf"\b{other}", name):
            raise Refused(f"method not modelled: {method}")
    if "full" in name or name.startswith("sft"):
        return "full", "none"
    if "gptq" in name:
        return "qlora", "gptq"
    if "int8" in name or "8bit" in name or "8-bit" in name:
        return "lora", "int8"
    if "qlora" in name or "4bit" in name or "nf4" in name:
        double = not re.search(r"nf4$", name.split("(")[0].strip())
        return "qlora", "nf4" if double else "nf4-single"
    if "lora" in name or _kind(name):
        return "lora", "none"
    raise Refused(f"method not modelled: {method}")


def _kind(method: str) -> str:
    """Adapters that are no pairs, by the recipe's name for them."""
    return next((kind for kind in ("adalora", "ia3", "vera", "oft") if re.search(rf"\b{kind}", method.lower())), "")


def _length(text: str, unknown: list[str]) -> int:
    numbers = [int(number) for number in re.findall(r"\d+", text.replace(",", ""))]
    if text.strip().isdigit() and numbers[0] > 0:
        return numbers[0]
    if not numbers or numbers[0] < 1 or "short" in text or re.match(r"<=\s*4096 unpacked", text):
        raise Refused("how long the rows really were is not stated")
    mean = re.search(r"mean (\d+)", text)
    if mean:  # the widest of many micro-batches, where lengths spread about as widely as their mean
        numbers[0] = min(numbers[0], round(2.75 * int(mean.group(1))))
    unknown.append("length")  # a bound that the longest row of a large set nearly reaches
    return numbers[0]


def _whole(text: str, what: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise Refused(f"{what} is not one number: {text[:30]!r}")
    return int(text)


def _options(row: dict[str, str]) -> TuningOptions:
    """What PEFT needs beside a rank: OFT's blocks are as wide as a row's rank, AdaLoRA begins with a higher one."""
    kind, rank = _kind(row["method"]), _rank(row["lora_r"]) if row["lora_r"] else 16
    if kind == "oft":
        return TuningOptions(block_size=max(rank, 2))
    return TuningOptions(initial_rank=round(1.5 * rank)) if kind == "adalora" else TuningOptions()


def _rank(text: str) -> int:
    """The rank; 16, what most examples have, where it is left out."""
    try:
        return max(int(float(text)), 1) if text.strip() else 16
    except ValueError:
        raise Refused(f"rank is not one number: {text[:30]!r}") from None


def _accumulation(text: str) -> int:
    found = re.search(r"grad_accum[= ]+(\d+)|\bga(\d+)\b", text)
    if found:
        return max(int(found.group(1) or found.group(2)), 1)
    return 16 if "lit-gpt" in text or "litgpt" in text else 1  # its scripts' batches in micro-batches


def _optimizer(name: str) -> str:
    if "lion" in name:
        return "lion"
    if "adafactor" in name:
        return "adafactor"
    if "sgd" in name:
        return "sgd"
    if "paged" in name:
        return "paged-adamw-8bit"
    return "adamw-8bit" if "8" in name else "adamw"


def _checkpointing(text: str) -> str:
    if text.startswith(("yes", "true", "fsdp", "full", "unsloth")):
        return "full"
    if text.startswith(("no", "false")) and "not stated" not in text:
        return "none"
    raise Refused(f"checkpointing is not stated: {text[:30]!r}")


def _strategy(row: dict[str, str], text: str) -> str:
    for pattern, name in _STRATEGIES:
        if re.search(pattern, text):
            return name
    if "fms" in text:  # its benchmarks run several devices under accelerate's FSDP configuration
        return "fsdp"
    raise Refused("several GPUs: how they share is not stated")


def _targets(text: str, architecture: Architecture) -> str | tuple[str, ...]:
    """The named modules as this architecture calls them; of regular expressions the names they hold."""
    if not text or re.search(r"all.linear|^all$|train\.py default", text):
        return "all-linear"
    known = {module.name for layer in architecture.layers for module in layer.linears}
    chosen: set[str] = set()
    for word in re.findall(r"[a-z0-9_]+", text.lower()):
        side = _MODULES.get(word.removesuffix("_proj"))
        if word in known:
            chosen.add(word)
        elif side:
            chosen |= set(_SIDES[side]) & known
        elif word == "mlp":
            chosen |= {module.name for layer in architecture.layers for module in layer.mlp}
    if "c_attn" in text and "w1" in text:
        return "all-linear"
    if not chosen:
        raise Refused(f"adapter targets not known: {text[:40]}")
    return tuple(sorted(chosen))
