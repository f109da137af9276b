"""Frameworks as tables of measured runs spell them, and what each of them runs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from finetui.planner.architecture import Architecture
from finetui.planner.stacks import STACKS, Stack

from .measured_words import Refused, method_of, sequence_shards_of

#: transformers 4 as fms-acceleration ran it: models turn their logits to fp32 and shift a copy of them (12 B per logit
#: in all), AdamW is the foreach series (torch 2.4), and the model's own forward runs under autocast. Experts are linear
#: modules.
_TRANSFORMERS_4 = replace(
    STACKS["transformers"], logit_forward=12.0, logit_backward=12.0, fused_optimizer=False, kbit_upcast=True,
    quantizes_experts=True, linear_experts=True,
)  # fmt: skip
#: From 4.46 on the loss is ``ForCausalLMLoss``, beside which the 16-bit logits live on.
_TRANSFORMERS_4_46 = replace(_TRANSFORMERS_4, logit_forward=14.0, logit_backward=14.0)
#: The fast kernels of the same repository: fused cross-entropy over 16-bit logits, fused norms and rotary embedding.
_FOAK = replace(_TRANSFORMERS_4, logit_forward=8.1, logit_backward=8.1, fused_norm=True, kbit_upcast=False)
#: From transformers 4.46 on its kernel is handed what ``ForCausalLMLoss`` makes.
_FOAK_4_46 = replace(_FOAK, logit_forward=9.3, logit_backward=9.3)
_FLCE = {"loss": "chunks", "logit_forward": 8.0, "logit_backward": 8.0}
#: Cut Cross-Entropy makes no logits at all; its blocks are smaller than a chunk of Liger's (arXiv:2411.09009).
_CCE = {"loss": "chunks", "logit_forward": 4.0, "logit_backward": 4.0, "chunk_tokens": 128}
_LIGER = {**_FLCE, "fused_norm": True, "fused_mlp": True, "fused_experts": True}
_COMPILED = {"fused_norm": True, "fused_mlp": True, "compiled": True}
_PLAIN = replace(STACKS["transformers"], autocast=False, fused_optimizer=False)
#: Qwen's remote code keeps 16-bit logits, a shifted copy and their log-softmax; DeepSpeed casts adapters to 16 bits.
_QWEN_1 = replace(
    STACKS["transformers"], logit_forward=6.0, logit_backward=8.0, kbit_upcast=False, adapter_bytes=2,
    adapter_bytes_4bit=2, casts_inputs=False, fused_norm=True, fused_optimizer=False, certain=False, logit_gaps=0.0,
)  # fmt: skip
#: The same without DeepSpeed, under autocast: its loss is in fp32, of a shifted copy.
_QWEN_1_ALONE = replace(_QWEN_1, logit_forward=14.0, logit_backward=14.0, adapter_bytes=4, casts_inputs=True)
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

#: Unsloth before its checkpoints waited in host memory (2024.4) and its loss went through the head in chunks (2024.11):
#: fused cross-entropy over 16-bit logits, which accelerate copies to fp32.
_UNSLOTH_2023 = replace(
    STACKS["unsloth"], loss="logits", logit_forward=8.1, logit_backward=8.1, chunk_gib=0.0, offloads_checkpoints=False,
    remakes_activation=False, compiled=False, recent_attention=False, fused_optimizer=False,
)  # fmt: skip
_BEFORE_UNSLOTH_2024_4 = r"unsloth[ =v_-]*(2023|2024[.-]0?[1-3]\b)"

#: From 2025 on ``training.compile`` compiles its loss too (``components/loss.py``): of it 16-bit logits and their
#: gradient alone are written.
_TORCHTITAN_2025 = replace(_TORCHTITAN, logit_forward=2.0, logit_backward=4.0)

#: 16-bit logits, divided by the temperature or shifted, and their log-softmax row by row.
_TRL_0 = replace(_TRAINER, logit_forward=6.0, logit_backward=8.0)
#: Where a row is spread over devices, ms-swift takes the loss of the 16-bit logits as they are, outside of autocast
#: (``loss_scale_sp_func`` in swift/trainers/sequence_parallel/utils.py): log-softmax, and the gradients of both.
_SWIFT_SPREAD = {"logit_forward": 4.0, "logit_backward": 8.0, "logit_gaps": 4.0}
#: TRL went through the head tile by tile from 1.0 on, and on transformers 5.
_BEFORE_TILES = r"trl[ =v_-]*0\.\d|(?:\btf|transformers)[ =v_-]*4\.\d|alignment-handbook"
#: ``optim="adamw_torch"`` is torch's AdamW with neither ``fused`` nor ``foreach`` set: the latter on a GPU. DeepSpeed
#: steps over flat groups instead.
_SERIES_OF_KERNELS = r"\badamw_torch\b"
#: fms-acceleration's benchmark of transformers 4.48 sets a dtype and no mixed precision (``scenarios.yaml``), those of
#: 4.45 set ``bf16`` too (``scenarios-granite.yaml``, ``scenarios-liger.yaml``).
_PLAIN_16_BITS = r"fms-hf-tuning.*\btf ?4\.48|mixed_precision[= :]+'?no\b"
#: Further GiB of a context of CUDA 11 (nvidia-smi of runs from 1.8B to 72B: 1.2 to 2.9).
_CUDA_11_GIB = 1.2
#: Families whose own code makes the loss of 16-bit logits (transformers before 5).
_OWN_LOSS = frozenset({"gpt2", "gpt_bigcode", "gpt_neox", "opt", "bloom", "mpt", "falcon", "codegen", "gptj"})
#: bitsandbytes whose 4-bit products hold on to their inputs.
_BNB_BEFORE_43 = r"(?:bnb|bitsandbytes)[ =v_-]*0\.(?:3\d|4[0-2])\b"
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


def knows(framework: str) -> bool:
    """Whether a framework's name is in the table; others are taken for programs on transformers' Trainer."""
    return any(part in framework.lower() for part, _ in _FRAMEWORKS)


def stack_of(framework: str, fused: str, method: str, notes: str = "", optimizer: str = "") -> Stack:
    """The stack that a row's framework, kernels and optimiser make.

    Raises:
        Refused: it splits layers over devices, or runs on other devices.
    """
    words = f"{framework} {method} {notes}".lower()
    before = bool(re.search(_BEFORE_TILES, words))
    found = _stack_of(framework, fused, method, words, before_tiles=before)
    if before and found.stock_model and not found.quantizes_experts:
        found = _before_5(found)
    if re.search(r"fsdp(?!\s?2|_version[= :]+2)", words) and found.upcasts_shards:
        found = replace(found, holds_input_gradients=True)
    if re.search(_PLAIN_16_BITS, words):
        found = replace(found, upcasts_shards=False)
    if re.search(r"\bcu(da)? ?11", words):
        found = replace(found, context_gib=_CUDA_11_GIB)
    if found.stock_model and re.search(_BNB_BEFORE_43, words):
        found = replace(found, keeps_packed_inputs=1)
    if found.name == "ms-swift" and found.loss == "logits" and sequence_shards_of(words) > 1:
        found = replace(found, **_SWIFT_SPREAD)
    if found.stock_model and re.search(_SERIES_OF_KERNELS, optimizer.lower()) and "deepspeed" not in words:
        found = replace(found, fused_optimizer=False)
    if "expandable_segments" in words:
        found = replace(found, expandable_segments=True)
    peft = re.search(r"peft[ =v]*0\.(\d+)", words)
    if peft and int(peft.group(1)) < _ADAPTERS_UPCAST and found.adapter_bytes == 4:
        found = replace(found, adapter_bytes=2, casts_inputs=False)
    return found


@lru_cache(maxsize=32)
def _before_5(stack: Stack) -> Stack:
    """The stack on transformers 4, whose experts are linear modules, which bitsandbytes quantises."""
    return replace(stack, quantizes_experts=True, linear_experts=True)


def _stack_of(framework: str, fused: str, method: str, words: str, *, before_tiles: bool) -> Stack:
    name, fused = framework.lower(), fused.strip().lower()
    if _NOT_MODELLED.search(name) and "swift" not in name:
        raise Refused(f"framework not modelled: {framework.split(',')[0]}")
    found = next((stack for part, stack in _FRAMEWORKS if part in name), None)
    if found is None:
        found = _TRAINER
    if found.name == "unsloth" and re.search(_BEFORE_UNSLOTH_2024_4, words):
        return _UNSLOTH_2023
    if found is _QWEN_1 and "deepspeed" not in name and "gptq" not in method.lower():
        return _QWEN_1_ALONE
    if found is _TRANSFORMERS_4 and re.search(r"\btf ?4\.(4[6-9]|5)", words) and "liger" not in fused:
        found = _FOAK_4_46 if "foak" in fused else _TRANSFORMERS_4_46
    if found in (_TRANSFORMERS_4, _TRANSFORMERS_4_46, _FOAK_4_46):
        base = found if found is not _TRANSFORMERS_4 else _FOAK if "foak" in fused or fused == "liger" else found
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
    if compiled and found is _TORCHTITAN and re.search(r"torch[ =v_-]*2\.([6-9]|1\d)", words):
        found = _TORCHTITAN_2025
    if compiled and found.name != "finetui":
        found = replace(found, **_COMPILED)
    if re.search(r"cut-?cross|cut cross|\bcce\b", fused):
        return replace(found, **_CCE)
    if "liger" in fused or ("liger" in name and "no liger" not in name):
        return STACKS["trl-liger"] if found.name == "trl" else replace(found, **_LIGER)
    return found


def with_own_loss(stack: Stack, architecture: Architecture, fused: str, *, autocast: bool) -> Stack:
    """The stack where the model's own code makes the loss of logits as they are, as GPT-2 and its kin do before 5.

    In 16 bits these are logits, their shifted copy, log-softmax and gradient; autocast runs the loss in fp32. A kernel
    for the loss spares a copy of each (gpt_bigcode on transformers 4.48: 6.5, 8, 14 and 18 B per logit).
    """
    if not stack.linear_experts or stack.loss != "logits" or architecture.model_type not in _OWN_LOSS:
        return stack
    width = (18.0 if autocast else 8.0) - ((4.0 if autocast else 1.5) if "foak" in fused.lower() else 0.0)
    return replace(stack, logit_forward=width, logit_backward=width)


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
