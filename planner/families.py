"""The table behind :mod:`.architecture`: one :class:`.family.Family` for each ``model_type`` of a config.json.

Every row is held to equality with transformers on the
meta device by ``tests/planner/test_architecture.py``. Source of all rows: ``modeling_*.py`` and
``configuration_*.py`` of transformers 5.17 to 5.23.
"""

from __future__ import annotations

from typing import Any

from .families_recent import RECENT
from .families_remote import REMOTE
from .family import Family, MoE
from .family import shape_defaults as _shape

_LAYER_NORM: dict[str, Any] = {"norm": "layer"}
_BIASED: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
_BY_ATTENTION_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_TIED = {"tie_word_embeddings": True}
_GPT2_SHAPE = _shape(50257, 768, None, 12, 12, n_positions=1024, **_TIED)
_MLA_SHAPE = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
_PROJECTIONS = ("gate", "gate_proj", "up_proj", "down_proj")
_DEEPSEEK_MOE = MoE(count=("n_routed_experts",), sparse="first_dense", shared="count", adapted=_PROJECTIONS)

#: ``model_type`` to how it is built.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama",
        _shape(32000, 4096, 11008, 32, 32, max_position_embeddings=2048),
        **_BY_ATTENTION_BIAS,
        mlp_bias="mlp_bias",
    ),
    "llama4_text": Family(
        "Llama 4",
        _shape(
            202048, 5120, 8192, 48, 40, 8, head_dim=128, intermediate_size_mlp=16384, num_local_experts=16,
            num_experts_per_tok=1, interleave_moe_layer_step=1, max_position_embeddings=131072,
        ),
        **_BY_ATTENTION_BIAS,
        moe=MoE(
            width=("intermediate_size",), sparse="interleave", shared="one", dense_width="intermediate_size_mlp",
            linear_router=True, everywhere=True,
        ),
    ),
    "arcee": Family(
        "Arcee",
        _shape(32000, 2560, 18432, 32, 32, max_position_embeddings=4096),
        **_BY_ATTENTION_BIAS,
        mlp_bias="mlp_bias",
        mlp=("up_proj", "down_proj"),
    ),
    "ernie4_5": Family(
        "ERNIE 4.5",
        _shape(103424, 1024, 3072, 18, 16, 2, head_dim=128, max_position_embeddings=131072, **_TIED),
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
    ),
    "seed_oss": Family(
        "Seed-OSS",
        _shape(155136, 4096, 27648, 64, 80, 8, head_dim=128, attention_bias=True, max_position_embeddings=524288),
        qkv_bias="attention_bias",
        out_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "olmoe": Family(
        "OLMoE",
        _shape(50304, 2048, 2048, 16, 16, num_experts=64, num_experts_per_tok=8, max_position_embeddings=4096),
        **_BY_ATTENTION_BIAS,
        qk_norm="width",
        moe=MoE(width=("intermediate_size",), count=("num_experts",), adapted=_PROJECTIONS),
    ),
    "mistral": Family(
        "Mistral",
        _shape(32000, 4096, 14336, 32, 32, 8, max_position_embeddings=131072, sliding_window=4096),
        window_every=1,
    ),
    "ministral3": Family(
        "Ministral 3", _shape(131072, 4096, 14336, 34, 32, 8, max_position_embeddings=262144, head_dim=128)
    ),
    "mixtral": Family(
        "Mixtral",
        _shape(32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2),
        moe=MoE(width=("intermediate_size",), adapted=("gate", "w1", "w3", "w2")),
        window_every=1,
    ),
    "qwen2": Family(
        "Qwen2",
        _shape(151936, 4096, 22016, 32, 32, 32, max_position_embeddings=32768, sliding_window=4096),
        qkv_bias=True,
        window_every=1,
        window_if="use_sliding_window",
    ),
    "qwen2_moe": Family(
        "Qwen2-MoE",
        _shape(
            151936, 2048, 5632, 24, 16, 16, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632, decoder_sparse_step=1, qkv_bias=True, max_position_embeddings=32768,
        ),
        qkv_bias="qkv_bias",
        moe=MoE(sparse="step", shared="size"),
    ),
    "qwen3": Family(
        "Qwen3",
        _shape(151936, 4096, 22016, 32, 32, 32, head_dim=128, max_position_embeddings=32768, sliding_window=4096),
        **_BY_ATTENTION_BIAS,
        qk_norm="dim",
        window_every=1,
        window_if="use_sliding_window",
    ),
    "qwen3_moe": Family(
        "Qwen3-MoE",
        _shape(
            151936, 2048, 6144, 24, 32, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
            decoder_sparse_step=1, max_position_embeddings=32768,
        ),
        **_BY_ATTENTION_BIAS,
        qk_norm="dim",
        moe=MoE(sparse="step", adapted=_PROJECTIONS),
    ),
    "gemma": Family(
        "Gemma",
        _shape(256000, 3072, 24576, 28, 16, 16, head_dim=256, max_position_embeddings=8192, **_TIED),
        **_BY_ATTENTION_BIAS,
    ),
    "gemma2": Family(
        "Gemma 2",
        _shape(
            256000, 2304, 9216, 26, 8, 4, head_dim=256, max_position_embeddings=8192, sliding_window=4096, **_TIED
        ),
        **_BY_ATTENTION_BIAS,
        norms=4,
        window_every=2,
    ),
    "gemma3_text": Family(
        "Gemma 3",
        _shape(
            262208, 2304, 9216, 26, 8, 4, head_dim=256, max_position_embeddings=131072, sliding_window=4096, **_TIED
        ),
        **_BY_ATTENTION_BIAS,
        norms=4,
        qk_norm="dim",
        window_every=6,
    ),
    "phi": Family(
        "Phi",
        _shape(51200, 2048, 8192, 24, 32, max_position_embeddings=2048),
        **_BIASED,
        **_LAYER_NORM,
        out="dense",
        mlp=("fc1", "fc2"),
        norms=1,
        qk_norm="dim",
        qk_norm_if="qk_layernorm",
        head_bias=True,
    ),
    "phi3": Family(
        "Phi-3",
        _shape(32064, 3072, 8192, 32, 32, max_position_embeddings=4096),
        qkv=("qkv_proj",),
        mlp=("gate_up_proj", "down_proj"),
        fused_gate=True,
        window_every=1,
    ),
    "smollm3": Family(
        "SmolLM3",
        _shape(128256, 2048, 11008, 36, 16, 4, max_position_embeddings=32768, **_TIED),
        **_BY_ATTENTION_BIAS,
        mlp_bias="mlp_bias",
        window_every=1,
        window_if="use_sliding_window",
    ),
    "olmo": Family(
        "OLMo", _shape(50304, 4096, 11008, 32, 32, max_position_embeddings=2048), **_BY_ATTENTION_BIAS, norm="fixed"
    ),
    "olmo2": Family(
        "OLMo 2",
        _shape(50304, 4096, 11008, 32, 32, max_position_embeddings=2048),
        **_BY_ATTENTION_BIAS,
        qk_norm="width",
    ),
    "olmo3": Family(
        "OLMo 3",
        _shape(50304, 4096, 11008, 32, 32, max_position_embeddings=2048, sliding_window=4096),
        **_BY_ATTENTION_BIAS,
        qk_norm="width",
        window_every=4,
    ),
    "granite": Family(
        "Granite",
        _shape(32000, 4096, 11008, 32, 32, max_position_embeddings=2048),
        **_BY_ATTENTION_BIAS,
        mlp_bias="mlp_bias",
    ),
    "gpt2": Family(
        "GPT-2", _GPT2_SHAPE, plain_heads=True, **_BIASED, **_LAYER_NORM, qkv=("c_attn",), out="c_proj",
        mlp=("c_fc", "c_proj"), positions="n_positions",
    ),
    "gpt_bigcode": Family(
        "GPT-BigCode", {**_GPT2_SHAPE, "multi_query": True}, **_BIASED, **_LAYER_NORM, qkv=("c_attn",), out="c_proj",
        mlp=("c_fc", "c_proj"), positions="n_positions",
    ),
    "gpt_neox": Family(
        "GPT-NeoX",
        _shape(50432, 6144, 24576, 44, 64, max_position_embeddings=2048, attention_bias=True),
        **_BY_ATTENTION_BIAS,
        **_LAYER_NORM,
        mlp_bias=True,
        plain_heads=True,
        qkv=("query_key_value",),
        out="dense",
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "gptj": Family(
        "GPT-J", _shape(50400, 4096, None, 28, 16, n_positions=2048), plain_heads=True, **_LAYER_NORM, mlp_bias=True,
        norms=1, out="out_proj", mlp=("fc_in", "fc_out"), head_bias=True,
    ),
    "opt": Family(
        "OPT", _shape(50272, 768, 3072, 12, 12, max_position_embeddings=2048, **_TIED), plain_heads=True, **_BIASED,
        **_LAYER_NORM, out="out_proj", mlp=("fc1", "fc2"), positions="max_position_embeddings", position_offset=2,
    ),
    "falcon": Family(
        "Falcon",
        _shape(65024, 4544, None, 32, 71, max_position_embeddings=2048, multi_query=True, parallel_attn=True, **_TIED),
        **_LAYER_NORM,
        qkv_bias="bias",
        out_bias="bias",
        mlp_bias="bias",
        qkv=("query_key_value",),
        out="dense",
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "mpt": Family(
        "MPT", _shape(50368, 2048, None, 24, 16, max_seq_len=2048, **_TIED), plain_heads=True, **_LAYER_NORM,
        norm_bias=False, qkv=("Wqkv",), out="out_proj", mlp=("up_proj", "down_proj"),
    ),
    "stablelm": Family(
        "StableLM", _shape(50304, 2560, 6912, 32, 32, 32, max_position_embeddings=4096), **_LAYER_NORM,
        qkv_bias="use_qkv_bias", qk_norm="heads", qk_norm_if="qk_layernorm",
    ),
    "starcoder2": Family(
        "StarCoder2",
        _shape(49152, 3072, 12288, 30, 24, 2, max_position_embeddings=4096, use_bias=True, **_TIED),
        **_LAYER_NORM,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        mlp=("c_fc", "c_proj"),
        window_every=1,
    ),
    "cohere": Family(
        "Command-R",
        _shape(256000, 8192, 22528, 40, 64, max_position_embeddings=8192, **_TIED),
        **_BY_ATTENTION_BIAS,
        norms=1,
        qk_norm="heads",
        qk_norm_if="use_qk_norm",
    ),
    "cohere2": Family(
        "Command-R7B / A",
        _shape(256000, 8192, 22528, 40, 64, max_position_embeddings=8192, sliding_window=4096, **_TIED),
        **_BY_ATTENTION_BIAS,
        norms=1,
        window_every=4,
    ),
    "deepseek_v2": Family(
        "DeepSeek-V2",
        _shape(
            102400, 4096, 11008, 32, 32, **_MLA_SHAPE, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
            moe_intermediate_size=1407, first_k_dense_replace=0, num_experts_per_tok=None, max_position_embeddings=2048,
        ),
        **_BY_ATTENTION_BIAS,
        mla=True,
        moe=_DEEPSEEK_MOE,
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3",
        _shape(
            129280, 7168, 18432, 61, 128, 128, **_MLA_SHAPE, v_head_dim=128, n_routed_experts=256, n_shared_experts=1,
            moe_intermediate_size=2048, first_k_dense_replace=3, num_experts_per_tok=8, max_position_embeddings=4096,
        ),
        **_BY_ATTENTION_BIAS,
        mla=True,
        moe=_DEEPSEEK_MOE,
    ),
    "glm": Family(
        "GLM-4",
        _shape(151552, 4096, 13696, 40, 32, 2, head_dim=128, max_position_embeddings=131072, attention_bias=True),
        qkv_bias="attention_bias",
        mlp=("gate_up_proj", "down_proj"),
        fused_gate=True,
    ),
    "glm4": Family(
        "GLM-4-0414",
        _shape(151552, 4096, 13696, 40, 32, 2, head_dim=128, max_position_embeddings=131072, attention_bias=True),
        qkv_bias="attention_bias",
        mlp=("gate_up_proj", "down_proj"),
        fused_gate=True,
        norms=4,
    ),
    "glm4_moe": Family(
        "GLM-4.5",
        _shape(
            151552, 4096, 10944, 46, 96, 8, n_routed_experts=128, n_shared_experts=1, moe_intermediate_size=1408,
            first_k_dense_replace=1, num_experts_per_tok=8, max_position_embeddings=131072,
        ),
        qkv_bias="attention_bias",
        qk_norm="dim",
        qk_norm_if="use_qk_norm",
        moe=_DEEPSEEK_MOE,
    ),
    "glm4_moe_lite": Family(
        "GLM-4.7-Flash",
        _shape(
            154880, 2048, 10240, 47, 20, 20, kv_lora_rank=512, q_lora_rank=768, qk_rope_head_dim=64,
            qk_nope_head_dim=192, v_head_dim=256, n_routed_experts=64, n_shared_experts=1, moe_intermediate_size=1536,
            num_experts_per_tok=4, max_position_embeddings=202752,
        ),
        **_BY_ATTENTION_BIAS,
        mla=True,
        moe=MoE(count=("n_routed_experts",), sparse="types", shared="count", adapted=_PROJECTIONS),
    ),
    "gpt_oss": Family(
        "gpt-oss",
        _shape(
            201088, 2880, 2880, 36, 64, 8, head_dim=64, num_local_experts=128, num_experts_per_tok=4,
            attention_bias=True, max_position_embeddings=131072, sliding_window=128,
        ),
        **_BY_ATTENTION_BIAS,
        sinks=True,
        moe=MoE(width=("intermediate_size",), bias=True),
        window_every=2,
    ),
    "exaone4": Family(
        "EXAONE 4",
        _shape(102400, 4096, 16384, 32, 32, 32, max_position_embeddings=2048, sliding_window=4096),
        qk_norm="dim",
        window_every=4,
    ),
    **RECENT,
    **REMOTE,
}  # fmt: skip
