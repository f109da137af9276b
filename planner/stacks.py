"""Stacks: what each framework really does with memory, as a table, with where it was read.

Read in trl 1.15 and 1.16, peft 0.21, transformers 5.17 to 5.23 and bitsandbytes 0.50, unless a row says otherwise:

- ``SFTTrainer`` projects the last hidden states tile by tile (4096 tokens x 32768 words) and never holds all logits:
  ``add_fused_lm_head`` in trl/trainer/utils.py, ``_ChunkedLogProbFunction`` in trl/kernels/chunked_logprob.py. Its
  gradients accumulate in fp32: 4 B per element of the last hidden states and, when the head is trained, of its weight,
  which are then copied to their own dtype.
- finetui's engine (engine/models/load.py) keeps pairs in fp32 on 4-bit weights too, and switches off PEFT's
  cast of their inputs, so that autocast turns the small pairs, not the large inputs, into 16 bits; without autocast for
  full bf16.
- LoRA pairs on 16-bit weights are fp32 (peft ``autocast_adapter_dtype``, tuners_utils.py ``cast_adapter_dtype``); on
  4-bit weights SFTTrainer casts them to bf16 (trl/trainer/sft_trainer.py, "When using QLoRA").
- ``bf16=True`` is the default (trl/trainer/base_config.py), so forward runs under autocast.
- SFTTrainer no longer calls peft's ``prepare_model_for_kbit_training``: norms, embeddings and head stay 16-bit.
- AdamW is the fused kernel (``default_optim`` in transformers/training_args.py, torch 2.8 and later): no temporaries.
- bitsandbytes replaces ``nn.Linear`` alone: head, embeddings, norms and fused experts keep the loading dtype
  (``get_keys_to_not_convert`` in transformers/quantizers/base.py; bitsandbytes issue 1849).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import RecipeError


@dataclass(frozen=True, eq=False)
class Stack:
    """One framework's choices. Bytes per logit are those of the loss over V x T logits."""

    name: str
    title: str
    versions: str
    loss: Literal["logits", "tiles", "chunks", "rows"]
    """``logits``: all at once; ``tiles``: tokens x words; ``chunks``: some tokens x all words; ``rows``: the same with
    their gradient made at once, so that backward needs no logits."""
    logit_forward: float = 0.0
    """Bytes per logit at the peak of the loss's forward."""
    logit_backward: float = 0.0
    """The same in its backward."""
    logit_held: float = 0.0
    """Bytes per logit that stay for all tokens although the loss goes through them in chunks."""
    chunk_tokens: int = 0
    """Tokens of one chunk or tile; 0 with ``chunks``: as many as Liger takes, next_pow2(T / ceil(V / H))."""
    chunk_gib: float = 0.0
    """In place of ``chunk_tokens``: GiB that the loss of one chunk may take."""
    tile_words: int = 0
    adapter_bytes: int = 4
    """Storage of LoRA pairs on 16-bit weights."""
    adapter_bytes_4bit: int = 2
    casts_inputs: bool = True
    """Whether an fp32 pair casts its input, which it then keeps as a copy of its own."""
    autocast: bool = True
    """Whether forward runs under autocast: fp32 pairs then compute, and keep their inputs, in 16 bits."""
    kbit_upcast: bool = False
    """Whether the weights that stay out of the 4 bits are turned to fp32, and the residual stream with them."""
    quantizes_head: bool = False
    """The output head is quantised too, and unpacked for each chunk of the loss."""
    quantizes_experts: bool = False
    whole_layers: bool = False
    """Layers of known families run as one function (:mod:`.fused`)."""
    fused_norm: bool = False
    """A norm kernel that keeps its 16-bit input alone."""
    fused_mlp: bool = False
    """A gated-MLP kernel that recomputes the activation instead of keeping it."""
    fused_experts: bool = False
    """The same for the experts of a mixture."""
    remakes_activation: bool = False
    """The down projection's adapter has the activation made again, instead of keeping it as its input."""
    fused_optimizer: bool = True
    """Whether AdamW is one kernel. As a series of ``foreach`` operations it needs one more copy of the parameters."""
    expandable_segments: bool = False
    """It sets ``PYTORCH_ALLOC_CONF=expandable_segments:True``."""
    waits_s: float = 0.0
    """Seconds of each step in which the GPU waits for the training loop's own Python."""
    waits_together_s: float = 0.0
    """The same where several devices agree after each step on what comes next, so that none tells of it late or runs
    ahead; 0: as alone."""
    runs_ahead: bool = False
    """The loop starts the next micro-batch while the GPU is at work on this one. transformers' Trainer looks whether
    each micro-batch's loss is a number (``logging_nan_inf_filter``), and so waits for it."""
    flat_optimizer: bool = False
    """An 8-bit optimiser takes its step over all tensors at once."""
    fused_qkv: bool = False
    """Queries, keys and values are one tensor, all of which stays while a part does, whatever the config says."""
    unties: bool = False
    """The head is a weight of its own where the model shares the embedding's."""
    keeps_scratch: bool = False
    """4-bit weights are unpacked into a buffer of its own, which stays (``kernels/nf4.py``)."""
    unpacks_in_kernel: bool = False
    """GPTQ weights are unpacked by one kernel instead of a series of torch operations."""
    keeps_packed_inputs: int = 0
    """How many graphs' inputs the 4-bit product keeps (bitsandbytes before 0.43): as attributes of its node they
    outlive backward, until the loop lets go of the old loss, which is after the next forward."""
    logit_alive: float = 0.0
    """Bytes per logit that the loop holds on to while backward runs."""
    logit_gaps: float = 7.0
    """Bytes per logit that the allocator keeps of a loss over all logits beyond what is allocated (runs on A100-80GB
    that state both: 5.7 to 7.5, with 14 bytes a logit in eager operations as with 8 in a fused kernel)."""
    logit_held_full: float = 0.0
    """``logit_held`` where the whole model is trained, if that is another."""
    merges_pairs: bool = False
    """Pairs on one fused projection are written into a wide tensor, which keeps what was written (``index_copy``)."""
    adds_in_product: bool = False
    """What pairs make is added to the output by the product that makes it (``addmm``), not by kernels of its own."""
    attention_speed: float = 1.0
    """Speed of its attention kernel against FlashAttention-2's."""
    stock_model: bool = True
    """Its modules are transformers' own: attention without a fused path is eager, activations may be written out."""
    compiled: bool = False
    """Whole layers are compiled, so that nothing waits between their products."""
    recent_attention: bool = False
    """Attention is torch's own of 2.9 or later, which is cuDNN's on Hopper."""
    followed: bool = False
    """Whether its step was followed through its real code (``tests/bench/coefficients.py``) and held against measured
    ones."""
    certain: bool = True
    """Whether its memory was read in its source or measured for these versions, not taken from what it documents."""
    flat_gradients: bool = False
    """FSDP1's flat parameters: where some of a layer is trained, the whole layer gets gradients."""
    accumulates_whole: bool = False
    """Gradients of several micro-batches add up before they are reduced and split (``no_sync``)."""
    offloads_checkpoints: bool = False
    """Checkpointed activations wait in host memory."""
    saves_in_fp32: bool = False
    """What is trained whole beside adapters (``modules_to_save``) is turned to fp32 too; PEFT leaves it as it is."""
    context_gib: float = 0.0
    """What the driver's context takes beyond that of CUDA 12 and later."""
    linear_experts: bool = False
    """Each expert is linear modules of its own, as in transformers before 5: quantised and sharded like any other."""
    upcasts_shards: bool = False
    """What is trained is turned to fp32 before FSDP splits it (accelerate, ``prepare_model`` for FSDP1 and
    ``fsdp2_prepare_model``, wherever mixed precision is on)."""
    shares_base: bool = False
    """Beside adapters, ``fsdp`` splits frozen layers, and an embedding that is not the head too, alone: two layers at a
    time are whole, in buffers that stay; head and adapters are whole on each device, and the optimiser is split."""
    holds_input_gradients: bool = False
    """FSDP1 over frozen layers that compute again: their reshard hooks (``register_multi_grad_hook``) hold on to the
    gradients of their inputs until backward is over."""
    source: str = ""


_TRL_SOURCE = "read in trl 1.16.0, peft 0.21.2, transformers 5.23.0"
#: What transformers' Trainer leaves the GPU without work between two steps (11 to 12 ms on an H200's host).
_TRAINER_S = 0.011
#: Ours tells of a step while the next one is under way: 89.4 ms a step of which the GPU works 86.3 (a 1B, replayed, on
#: the same host). Where a gradient's norm is waited for, as for other optimisers than AdamW, it is more.
_OWN_S = 0.003
_FUSED = {"fused_norm": True, "fused_mlp": True, "fused_experts": True}
_TILES = {
    "loss": "tiles",
    "chunk_tokens": 4096,
    "tile_words": 32768,
    "recent_attention": True,
    "waits_s": _TRAINER_S,
    "followed": True,
    "upcasts_shards": True,
}

#: Framework to what it does. The first is what finetui's own engine runs: TRL's SFTTrainer with PEFT.
STACKS: dict[str, Stack] = {
    stack.name: stack
    for stack in (
        Stack(
            "finetui",
            "finetui",
            "trl 1.15+, peft 0.21",
            loss="rows",
            chunk_tokens=1024,
            adapter_bytes_4bit=4,
            casts_inputs=False,
            whole_layers=True,
            keeps_scratch=True,
            flat_optimizer=True,
            saves_in_fp32=True,
            shares_base=True,
            expandable_segments=True,
            followed=True,
            waits_s=_OWN_S,
            waits_together_s=_TRAINER_S,
            runs_ahead=True,
            recent_attention=True,
            source=_TRL_SOURCE,
        ),
        Stack("trl", "TRL", "1.15+", **_TILES, source=_TRL_SOURCE),  # type: ignore[arg-type]
        # TRL turns Liger's fused linear cross-entropy off in favour of its own tiles; the other kernels stay.
        Stack("trl-liger", "TRL + Liger", "1.15+", **_TILES, **_FUSED, source=_TRL_SOURCE),  # type: ignore[arg-type]
        Stack(
            "unsloth",
            "Unsloth",
            "2026.10",
            loss="rows",
            logit_forward=4.0,
            chunk_gib=4.0,
            waits_s=_TRAINER_S,
            compiled=True,
            adapter_bytes_4bit=4,
            casts_inputs=False,
            remakes_activation=True,
            adds_in_product=True,
            recent_attention=True,
            **_FUSED,
            offloads_checkpoints=True,
            quantizes_experts=True,
            stock_model=False,
            certain=False,
            source="read in unsloth_zoo 2026.10.9: fused_losses, gradient_checkpointing; unsloth: matmul_lora",
        ),
        Stack(
            "axolotl",
            "Axolotl",
            "0.9+",
            loss="chunks",
            logit_forward=4.0,
            logit_backward=4.0,
            adapter_bytes_4bit=4,
            kbit_upcast=True,
            quantizes_experts=True,
            stock_model=False,
            certain=False,
            source="its example configurations: CutCrossEntropy or Liger's fused linear cross-entropy; its own "
            "fsdp2_prepare_model (monkeypatch/accelerate/fsdp2.py) splits the weights as they were loaded",
        ),
        Stack(
            "torchtune",
            "torchtune",
            "0.6",
            loss="logits",
            logit_forward=3.0,
            logit_backward=3.0,
            adapter_bytes=2,
            autocast=False,
            stock_model=False,
            source="CEWithChunkedOutputLoss: 16-bit logits of all tokens, 8 chunks upcast (8 B per logit) in turn",
        ),
        # Plain transformers' ForCausalLMLoss: 16-bit logits and an fp32 copy, then its softmax and gradient.
        Stack(
            "transformers",
            "transformers Trainer + PEFT",
            "5.x",
            loss="logits",
            logit_forward=10.0,
            logit_backward=14.0,
            adapter_bytes_4bit=4,
            kbit_upcast=True,
            upcasts_shards=True,
            source="bytes per logit measured on transformers 5 (loss_utils.ForCausalLMLoss)",
        ),
        Stack(
            "ms-swift",
            "ms-swift",
            "3.x",
            loss="logits",
            logit_forward=10.0,
            logit_backward=14.0,
            adapter_bytes_4bit=4,
            upcasts_shards=True,
            certain=False,
            source="transformers' ForCausalLMLoss and PEFT's dtypes under Seq2SeqTrainer; scripts of examples/train",
        ),
        Stack(
            "llama-factory",
            "LLaMA-Factory",
            "0.9",
            loss="logits",
            logit_forward=10.0,
            logit_backward=14.0,
            adapter_bytes_4bit=4,
            upcasts_shards=True,
            certain=False,
            source="transformers' ForCausalLMLoss under its Seq2SeqTrainer; all that is trained upcast to fp32 "
            "(model/adapter.py), on 4-bit weights too",
        ),
        # The loss is cut in chunks, but the logits of all chunks stay for backward, in fp32, since Fabric turns what a
        # model answers to it (``convert_output``), and so do their log-softmax and the logits of the step before. Where
        # the head is trained, logits are made whole and copied once more.
        Stack(
            "litgpt",
            "LitGPT",
            "0.3 to 0.5",
            loss="chunks",
            logit_forward=4.0,
            logit_backward=8.0,
            logit_held=12.0,
            logit_held_full=16.0,
            logit_alive=4.0,
            chunk_tokens=128,
            merges_pairs=True,
            quantizes_head=True,
            adapter_bytes=2,
            autocast=False,
            casts_inputs=False,
            fused_optimizer=False,
            fused_qkv=True,
            unties=True,
            keeps_packed_inputs=2,
            flat_gradients=True,
            accumulates_whole=True,
            stock_model=False,
            source="litgpt/model.py, lora.py (one qkv Linear, bf16-true), finetune/lora.py; Fabric's HalfPrecision",
        ),
        Stack(
            "fsdp-qlora",
            "fsdp_qlora",
            "2024-03",
            loss="logits",
            logit_forward=14.0,
            logit_backward=14.0,
            adapter_bytes=2,
            autocast=False,
            casts_inputs=False,
            fused_optimizer=False,
            holds_input_gradients=True,
            source="train.py: pure bf16, adapters in the compute dtype, transformers 4.38's loss with its shifted copy",
        ),
        Stack(
            "llm-foundry",
            "LLM Foundry",
            "0.5",
            loss="logits",
            logit_forward=8.0,
            logit_backward=10.0,
            fused_norm=True,
            attention_speed=0.55,  # FlashAttention in Triton: 1.3 to 2.5 times slower (arXiv:2307.08691)
            certain=False,
            stock_model=False,
            source="scripts/train/benchmarking: FSDP1 FULL_SHARD, flash attention, low-precision LayerNorm, Lion",
        ),
    )
}


def find_stack(framework: str) -> Stack:
    """The stack of a ``--framework`` name.

    Raises:
        RecipeError: the name is not in the table.
    """
    if framework not in STACKS:
        raise RecipeError(f"there is no framework {framework!r}", where="--framework", do=f"Use {', '.join(STACKS)}.")
    return STACKS[framework]
