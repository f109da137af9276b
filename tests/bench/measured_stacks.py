"""Frameworks as tables of measured runs spell them, and what each of them runs."""

from __future__ import annotations

import re
from dataclasses import replace

from finetui.planner.stacks import STACKS, Stack

from .measured_words import Refused, method_of

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
_LIGER = {**_FLCE, "fused_norm": True, "fused_mlp": True, "fused_experts": True}
_COMPILED = {"fused_norm": True, "fused_mlp": True, "compiled": True}
_PLAIN = replace(STACKS["transformers"], autocast=False, fused_optimizer=False)
#: Qwen's remote code keeps 16-bit logits, a shifted copy and their log-softmax; DeepSpeed casts adapters to 16 bits.
_QWEN_1 = replace(
    STACKS["transformers"], logit_forward=6.0, logit_backward=8.0, kbit_upcast=False, adapter_bytes=2,
    adapter_bytes_4bit=2, casts_inputs=False, fused_norm=True, fused_optimizer=False, certain=False,
)  # fmt: skip
#: Its scripts of 2023 run the longest row first, so nothing of an earlier step is as large.
_LIT_GPT = replace(STACKS["litgpt"], logit_held=8.0, keeps_packed_inputs=1)
#: Programs on transformers' own Trainer whose memory was not followed.
_TRAINER = replace(STACKS["transformers"], certain=False)
#: torch's own modules in a loop of its own: 16-bit logits and their fp32 copy, softmax and gradient.
_OWN_LOOP = replace(
    STACKS["transformers"], logit_forward=10.0, logit_backward=12.0, kbit_upcast=False, stock_model=False,
    certain=False,
)  # fmt: skip

#: Its ``run_train.sh`` sets ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
_TORCHTITAN = replace(_OWN_LOOP, waits_s=0.0, expandable_segments=True)

#: 16-bit logits, divided by the temperature or shifted, and their log-softmax row by row.
_TRL_0 = replace(_TRAINER, logit_forward=6.0, logit_backward=8.0)
#: TRL went through the head tile by tile from 1.0 on, and on transformers 5.
_BEFORE_TILES = r"trl[ =v_-]*0\.\d|(?:\btf|transformers)[ =v_-]*4\.\d|alignment-handbook"
#: PEFT 0.12 began to turn adapters on 16-bit weights to fp32 (``autocast_adapter_dtype``).
_ADAPTERS_UPCAST = 12

#: Further programs that train transformers' models as they are.
_ON_TRANSFORMERS = (
    "alpaca", "longlora", "qlora", "h2o", "autotrain", "ludwig", "instructlab", "firefly", "belle", "galore", "verl",
    "easyr1", "prime-rl",
)  # fmt: skip

#: Part of the framework's name, in lower case and the order they are looked for, to what it runs.
_FRAMEWORKS: tuple[tuple[str, Stack], ...] = (
    ("unsloth", STACKS["unsloth"]),
    ("axolotl", STACKS["axolotl"]),
    ("torchtune", STACKS["torchtune"]),
    ("fsdp_qlora", STACKS["fsdp-qlora"]),
    ("fsdp-qlora", STACKS["fsdp-qlora"]),
    ("llm-foundry", STACKS["llm-foundry"]),
    ("llm foundry", STACKS["llm-foundry"]),
    ("llmfoundry", STACKS["llm-foundry"]),
    ("lit-gpt", _LIT_GPT),
    ("litgpt", STACKS["litgpt"]),
    ("lit-llama", _LIT_GPT),
    ("fms-fsdp", _OWN_LOOP),
    ("fms", _TRANSFORMERS_4),
    ("remote-code qwen", _QWEN_1),
    ("swift", STACKS["ms-swift"]),
    ("llama-factory", STACKS["llama-factory"]),
    ("llamafactory", STACKS["llama-factory"]),
    ("llama factory", STACKS["llama-factory"]),
    ("llama-efficient-tuning", STACKS["llama-factory"]),
    ("peft, plain loop", _PLAIN),
    ("finetui", STACKS["finetui"]),
    ("torchtitan", _TORCHTITAN),
    ("nanogpt", _OWN_LOOP),
    ("nanochat", _OWN_LOOP),
    ("mistral-finetune", _OWN_LOOP),
    ("trl", STACKS["trl"]),
    ("alignment-handbook", STACKS["trl"]),
    ("xtuner", _TRAINER),
    ("openrlhf", _TRAINER),
    ("lmflow", _TRAINER),
    ("fastchat", _TRAINER),
    ("open-instruct", _TRAINER),
    ("llama-recipes", _TRAINER),
    ("llama-cookbook", _TRAINER),
    ("liger", _TRAINER),
    ("transformers", STACKS["transformers"]),
    ("hf trainer", STACKS["transformers"]),
    ("huggingface", STACKS["transformers"]),
    ("hugging face", STACKS["transformers"]),
    ("hf ", STACKS["transformers"]),
    ("accelerate", _TRAINER),
    ("deepspeed", _TRAINER),
    ("peft", _PLAIN),
    *((name, _TRAINER) for name in _ON_TRANSFORMERS),
    *((name, _OWN_LOOP) for name in ("composer", "olmo-core", "fairseq2")),
    ("lightning", _OWN_LOOP),
    ("fabric", _OWN_LOOP),
    ("pytorch", _OWN_LOOP),
    ("torch", _OWN_LOOP),
)
#: Programs whose layers are split over devices, or that run on other devices.
_NOT_MODELLED = re.compile(r"megatron|nemo\b|nemo-|nanotron|colossal|gpt-neox|maxtext|jax|levanter|mlx|neuron|habana")
#: How a framework shares where a row does not say, if it has but one way (its distributed recipes, scripts or default).
_USUAL = (
    ("fms", "fsdp"), ("torchtune", "fsdp"), ("torchtitan", "fsdp"), ("llm-foundry", "fsdp"), ("llm foundry", "fsdp"),
    ("lit", "fsdp"), ("mistral-finetune", "fsdp"), ("fsdp_qlora", "fsdp"), ("unsloth", "ddp"), ("nanogpt", "ddp"),
)  # fmt: skip


def stack_of(framework: str, fused: str, method: str, notes: str = "") -> Stack:
    """The stack that a row's framework and kernels make.

    Raises:
        Refused: nothing here knows it.
    """
    words = f"{framework} {method} {notes}".lower()
    found = _stack_of(framework, fused, method, before_tiles=bool(re.search(_BEFORE_TILES, words)))
    if "expandable_segments" in words:
        found = replace(found, expandable_segments=True)
    peft = re.search(r"peft[ =v]*0\.(\d+)", words)
    if peft and int(peft.group(1)) < _ADAPTERS_UPCAST and found.adapter_bytes == 4:
        found = replace(found, adapter_bytes=2, casts_inputs=False)
    return found


def _stack_of(framework: str, fused: str, method: str, *, before_tiles: bool) -> Stack:
    name, fused = framework.lower(), fused.strip().lower()
    if _NOT_MODELLED.search(name) and "swift" not in name:
        raise Refused(f"framework not modelled: {framework.split(',')[0]}")
    found = next((stack for part, stack in _FRAMEWORKS if part in name), None)
    if found is None:
        raise Refused(f"framework not known: {framework.split(',')[0]}")
    if found is _TRANSFORMERS_4:
        base = _FOAK if "foak" in fused or fused == "liger" else found
        plain = "accelerated" in fused or "gptq" in method.lower()  # PEFT upcasts nothing beside GPTQ weights
        base = replace(base, kbit_upcast=base.kbit_upcast and not plain, unpacks_in_kernel="accelerated" in fused)
        return replace(base, **_FLCE) if "liger" in fused or "flce" in fused else base
    compiled = bool(re.search(r"compile ?= ?(yes|true|on)|compile on|torch\.compile|\+ ?compile|compiled", name))
    if found is STACKS["trl"] and before_tiles:  # the Trainer's loss, or of other methods its own over 16-bit logits
        found = _TRAINER if method_of(method) in ("sft", "pretrain") else _TRL_0
    if found.name == "torchtune":
        compiled = compiled or "compile" in fused
        found = replace(found, **_COMPILED) if compiled else found
        if fused == "full":  # the head's output is upcast as a whole; compiled, its copies are folded
            width = 10.0 if compiled else 14.0
            return replace(found, logit_forward=width, logit_backward=width)
        # Compiled, the fp32 copies of a chunk are folded into one kernel: 16-bit logits, and a chunk's gradient.
        return replace(found, logit_forward=2.25, logit_backward=2.25) if compiled else found
    if compiled and found.name != "finetui":
        found = replace(found, **_COMPILED)
    if re.search(r"cut-?cross|cut cross|\bcce\b", fused):
        return replace(found, **_CCE)
    if "liger" in fused or ("liger" in name and "no liger" not in name):
        return STACKS["trl-liger"] if found.name == "trl" else replace(found, **_LIGER)
    return found


def usual_strategy(framework: str) -> str:
    """How a framework shares by itself; empty where a row has to say."""
    name = framework.lower()
    return next((strategy for part, strategy in _USUAL if part in name), "")


def usual_checkpointing(framework: str, devices: int) -> str:
    """Whether a program checkpoints unless told otherwise; empty where a row has to say.

    ``use_gradient_checkpointing="unsloth"`` of Unsloth's notebooks; ``disable_gradient_checkpointing: false`` of
    LLaMA-Factory and ``gradient_checkpointing: true`` of ms-swift by default; LitGPT's scripts under FSDP alone.
    """
    name = framework.lower()
    if re.search(r"unsloth|llama[ -]?factory|swift", name):
        return "yes"
    return ("yes" if devices > 1 else "no") if re.search(r"lit-?gpt", name) else ""


def is_compiled(framework: str, fused: str) -> bool:
    """Whether a compiler decides what is kept."""
    words = f"{framework} {fused}".lower()
    return bool(re.search(r"compile ?= ?(yes|true|on)|compile on|torch\.compile on|\+ ?compile|compiled", words))
