"""Reads a row of a table of measured runs as a question to the planner, or says why it can't be one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from finetui.planner.adapters import ELSEWHERE
from finetui.planner.architecture import Architecture
from finetui.planner.hardware import Gpu, find_gpu
from finetui.planner.memory import peak_memory
from finetui.planner.methods import METHODS
from finetui.planner.options import TuningOptions
from finetui.planner.passes import Passes, usual
from finetui.planner.settings import Settings
from finetui.planner.stacks import Stack

from .measured_names import architecture_of, gpu_of, memory_of
from .measured_sizes import usual_of_size
from .measured_stacks import is_compiled, knows, stack_of, usual_checkpointing, usual_strategy, with_own_loss
from .measured_words import (
    Refused,
    accumulation_of,
    attention_of,
    checkpointing_of,
    kind_of,
    length_of,
    method_of,
    not_stated,
    offload_of,
    optimizer_of,
    precision_of,
    prompt_and_answer,
    rank_of,
    sequence_shards_of,
    strategy_of,
    targets_of,
    tuning_of,
    whole,
    widest_of,
)

__all__ = ["Question", "Refused", "question"]


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
    most_gib: float
    """What the run can have held: it finished on this GPU."""
    beside_gib: float = 0.0
    """What vLLM holds of the same GPU."""
    loading_gib: float = 0.0
    """What is allocated while the model comes to where it is trained, if steps may need less."""


def question(row: dict[str, str], configs: Path | None = None) -> Question:
    """Read one row.

    Raises:
        Refused: the model, a setting, the framework or how devices share is not known or not stated.
    """
    text = " ".join((row["framework"], row["method"], row["notes"])).lower()
    unknown: list[str] = []
    architecture = _architecture(row["model"], configs, unknown)
    settings = _settings(row, text, architecture, unknown)
    if {"length", "short"} & {*unknown} and not re.search(r"empty_cache|reserved/active", text):
        settings = replace(settings, varies=True)
    stack = stack_of(row["framework"], row["fused"], row["method"], row["notes"], row["optimizer"])
    if not knows(row["framework"]):
        unknown.append("program")
    plain = not stack.upcasts_shards and not settings.quantized  # no mixed precision
    stack = with_own_loss(stack, architecture, row["fused"], autocast=not plain)
    if is_compiled(row["framework"], row["fused"]):
        unknown.append("compiled")
    metric = _metric(row["notes"], row["framework"], unknown)
    gpu = gpu_of(row["gpu"])  # memory hardly depends on it, speed does
    most = _most(row["gpu"], gpu)
    if "strategy" in unknown:
        held = peak_memory(architecture, settings, stack, gpu or find_gpu("A100")).allocated_gib
        if gpu is None or held > most:
            raise Refused("several GPUs: how they share is not stated, and a copy on each does not fit")
    whole_rows = sequence_shards_of(text) == 1 and not {"length", "short", "batch"} & {*unknown}
    across = re.search(r"multi-?node", text)  # whose network is not stated
    times = gpu is not None and whole_rows and not across
    return Question(
        architecture, settings, stack, gpu or find_gpu("A100"), metric, tuple(unknown), times, most,
        _generating(text, settings.method, gpu), _loading(text, architecture, settings, stack),
    )  # fmt: skip


def _architecture(model: str, configs: Path | None, unknown: list[str]) -> Architecture:
    try:
        return architecture_of(model, configs)
    except Refused:
        usual = usual_of_size(model)
        if usual is None:
            raise
        unknown.append("shapes")
        return usual


def _generating(text: str, method: str, gpu: Gpu | None) -> float:
    """GiB that vLLM takes of the GPU it shares with training, unless it sleeps then; 0.3 of it by TRL's default."""
    if gpu is None or not METHODS[method].rollouts or "vllm" not in text or re.search(r"server|sleep|separate", text):
        return 0.0
    said = re.search(r"(?:gpu[_ ]memory[_ ]utili[sz]ation|util\w*)[ =:]*(0?\.\d+)", text)
    return float(said.group(1) if said else 0.3) * gpu.memory_gib


def _loading(text: str, architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """GiB of a quantised model that accelerate brings to FSDP2: whole on each GPU, and then its shard beside it
    (``fsdp2_prepare_model`` leaves out the way over the meta device for bitsandbytes' weights)."""
    accelerated = stack.upcasts_shards or stack.name == "axolotl"
    if not (settings.quantized and settings.sharing.gathers == "layers" and accelerated and "fsdp2" in text):
        return 0.0
    whole = peak_memory(architecture, replace(settings, world_size=1), stack, find_gpu("A100")).terms["weights"]
    return whole * (1 + 1 / settings.world_size)


def _most(name: str, gpu: Gpu | None) -> float:
    """GiB of a GPU. Some of a kind have more than that of the catalog: then what the row says."""
    said = memory_of(name)
    return max(gpu.memory_gib, said) if gpu else said or math.inf


def _metric(notes: str, framework: str, unknown: list[str]) -> str:
    stated = re.search(r"metric=([^;]*)", notes)
    text = (stated.group(1) if stated else notes).lower()
    if "nvidia-smi" in text or "nvml" in text:
        return "device"
    if "reserved" in text and "logs reserved/active" not in text:
        return "reserved"
    if not stated or "not stated" in text:
        unknown.append("metric")
        if "torchtune" in framework.lower():  # its README prints the peak of what is active
            return "allocated"
        # Figures without a word on it are mostly read off nvidia-smi, unless the framework prints its own.
        return "device" if "not stated" in text and "logs" not in text else "reserved"
    return "allocated"


def _settings(row: dict[str, str], text: str, architecture: Architecture, unknown: list[str]) -> Settings:
    method, framework = method_of(row["method"]), row["framework"].lower()
    tuning, quantization = tuning_of(row["method"], row["lora_r"], row["framework"])
    full, world = tuning == "full", whole(row["num_gpus"] or "1", "number of GPUs")
    checkpoint, optimizer = row["grad_ckpt"].lower(), row["optimizer"]
    usual = usual_checkpointing(framework, world)
    if usual and re.fullmatch(r"\W*|(the )?(framework'?s? )?default( \(?not stated\)?)?", checkpoint):
        checkpoint = usual
        unknown.append("checkpointing")
    elif not_stated(checkpoint):
        checkpoint = "no" if "plain loop" in framework else "yes"
        unknown.append("checkpointing")
    elif re.fullmatch(r"\W*(selective|partial|half)\W*", checkpoint):  # of what is not said: torchtitan's default
        checkpoint = "selective op"
        unknown.append("checkpointing")
    policy, kept, outputs = checkpointing_of(checkpoint, architecture.num_layers)
    if "calls them estimates" in text:
        raise Refused("the source calls its figures estimates")
    if "yaml devices=1" in checkpoint and world > 1:
        raise Refused("the source runs on one device where the row says several")
    if "checkpointing off (not stated)" in text:
        raise Refused("the optimiser or checkpointing is not stated")
    # Qwen's script for GPTQ weights on one device runs them under DeepSpeed's ZeRO-2.
    alone = "zero2" if quantization == "gptq" and "qwen" in text else strategy_of(text, "ddp")
    alone = alone if alone.startswith("zero") else "ddp"  # DeepSpeed keeps its masters on one device too
    strategy = strategy_of(text, usual_strategy(framework)) if world > 1 else alone
    if not strategy:  # torchrun without a word on sharding; too large a model is refused below
        strategy = "ddp"
        unknown.append("strategy")
    if "length" not in unknown and re.search(r"packing *[=:] *(false|no|off|none)", text):
        unknown.append("length")  # rows of any length up to the limit
    kind = "" if full else kind_of(row["method"])
    states = optimizer_of(f"{optimizer} {row['method'] if 'galore' in text or 'apollo' in text else ''}", matters=full)
    rows = _rows(row["micro_batch"], unknown)
    length = length_of(row["seq_len"], unknown, widest_of(text, rows)) // sequence_shards_of(text)
    if re.search(r"pack(ed|ing *[=:] *true)", f"{row['seq_len']} {row['notes']}".lower()):
        length //= METHODS[method].sequences  # both halves of a pair are in the row
    return Settings(
        method=method,
        tuning=tuning,  # type: ignore[arg-type]
        sequence_length=max(length, 1) + _virtual_tokens(row, kind, architecture),
        micro_batch=rows,
        accumulation=accumulation_of(text),
        # LitGPT's scripts and Qwen's finetune.py drop 0.05.
        dropout=not full and bool(re.search(r"lora_dropout=0\.0*[1-9]|lit-?gpt|remote-code qwen", text)),
        rank=rank_of(row["lora_r"]) if not full else 16,
        kind=kind,
        trained=_counted(row, architecture, kind),
        options=_options(row, kind),
        targets=targets_of(row["targets"], architecture) if not full else "all-linear",
        dora="dora" in row["method"].lower(),
        quantization=quantization,  # type: ignore[arg-type]
        precision=precision_of(f"{framework} {row['method']}", row["notes"].lower(), strategy, full=full),  # type: ignore[arg-type]
        fp8_products=full and bool(re.search(r"fp8|float8", text)),
        optimizer=states,
        optimizer_in_backward=bool(re.search(r"in[ _]b(ack)?w|layer-?wise|per-layer|lomo", optimizer.lower())),
        checkpointing=policy,  # type: ignore[arg-type]
        kept_layers=kept,
        keeps_outputs=outputs,
        attention=attention_of(row["flash_or_sdpa"]),  # type: ignore[arg-type]
        world_size=world,
        strategy=strategy,
        offload=offload_of(text),  # type: ignore[arg-type]
        passes=_passes(row["seq_len"], method, full=full),
    )


def _passes(lengths: str, method: str, *, full: bool) -> Passes | None:
    """Of methods that generate, what TRL does with answers as long as the row says; None where it does not."""
    both = prompt_and_answer(lengths)
    if not both or not METHODS[method].rollouts:
        return None
    return replace(usual(method, full=full, sequence_length=sum(both)), completion=both[1])


def _options(row: dict[str, str], kind: str) -> TuningOptions:
    """What PEFT needs beside a rank: OFT's blocks are as wide as a row's rank, AdaLoRA begins with a higher one."""
    rank = rank_of(row["lora_r"])
    if re.search(r"\(emb|\+ ?emb|embed|modules_to_save", row["method"].lower()):
        return TuningOptions(modules_to_save=("embed_tokens", "lm_head"))
    if kind == "oft":
        return TuningOptions(block_size=max(rank, 2))
    return TuningOptions(initial_rank=round(1.5 * rank)) if kind == "adalora" else TuningOptions()


def _rows(text: str, unknown: list[str]) -> int:
    """Rows of a micro-batch; one, what memory tables mostly mean, where it is left out."""
    if not_stated(text) and "auto" not in text.lower():
        unknown.append("batch")
        return 1
    return whole(text, "micro batch")


def _virtual_tokens(row: dict[str, str], kind: str, architecture: Architecture) -> int:
    """Learned tokens that stand before every row: as many as were trained, each as wide as hidden states."""
    said = re.search(r"trainable=([\d,]+)", row["notes"])
    return int(said.group(1).replace(",", "")) // architecture.hidden if kind == "prompt" and said else 0


def _counted(row: dict[str, str], architecture: Architecture, kind: str) -> int:
    """Trained parameters of an adapter that the planner does not count: what the row says, or as many as LoRA has."""
    if kind not in ELSEWHERE:
        return 0
    said = re.search(r"trainable=([\d,]+)", row["notes"])
    if said:
        return int(said.group(1).replace(",", ""))
    return architecture.lora_parameters(rank_of(row["lora_r"]), "all-linear")
