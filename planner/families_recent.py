"""The table of families, continued: architectures of 2025 and 2026, and the text towers of vision-language models."""

from __future__ import annotations

from typing import Any

from .family import Family, MoE
from .family import shape_defaults as _shape

_BY_ATTENTION_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_LAYER_NORM: dict[str, Any] = {"norm": "layer"}
_TIED = {"tie_word_embeddings": True}
_PROJECTIONS = ("gate", "gate_proj", "up_proj", "down_proj")
_DELTA = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "head_dim": 256,
}  # fmt: skip
_QWEN3_5_SHAPE = _shape(248320, 4096, 12288, 32, 16, 4, max_position_embeddings=32768, **_DELTA)
_QWEN3_5_MOE_SHAPE = _shape(
    248320, 2048, 8192, 40, 16, 2, num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512,
    shared_expert_intermediate_size=512, max_position_embeddings=32768, **_DELTA,
)  # fmt: skip
_GATED: dict[str, Any] = {**_BY_ATTENTION_BIAS, "qk_norm": "dim", "gated_query": True}
_GEMMA4_SHAPE = _shape(
    262144, 2304, 9216, 30, 8, 4, head_dim=256, max_position_embeddings=131072, sliding_window=512,
    vocab_size_per_layer_input=262144, hidden_size_per_layer_input=256, **_TIED,
)  # fmt: skip
_GEMMA4: dict[str, Any] = {**_BY_ATTENTION_BIAS, "norms": 4, "qk_norm": "dim", "window_every": 6, "shared_keys": True}

_VL = _shape(152064, 8192, 29568, 80, 64, 8, max_position_embeddings=32768, sliding_window=4096)
_QWEN2_VL: dict[str, Any] = {"qkv_bias": True, "window_every": 1, "window_if": "use_sliding_window"}

RECENT: dict[str, Family] = {
    "gemma4_text": Family("Gemma 4", _GEMMA4_SHAPE, **_GEMMA4),
    "gemma4_unified_text": Family("Gemma 4", {**_GEMMA4_SHAPE, "hidden_size_per_layer_input": 0}, **_GEMMA4),
    "vaultgemma": Family(
        "VaultGemma",
        _shape(
            256000, 2304, 9216, 26, 8, 4, head_dim=256, max_position_embeddings=8192, sliding_window=4096, **_TIED
        ),
        **_BY_ATTENTION_BIAS,
        window_every=2,
    ),
    "qwen3_next": Family(
        "Qwen3-Next",
        _shape(
            151936, 2048, 5632, 48, 16, 2, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
            shared_expert_intermediate_size=512, decoder_sparse_step=1, max_position_embeddings=32768, **_DELTA,
        ),
        **_GATED,
        delta_net="fused",
        moe=MoE(sparse="step", shared="size", adapted=_PROJECTIONS),
    ),
    "qwen3_5_text": Family("Qwen3.5", _QWEN3_5_SHAPE, **_GATED, delta_net="split"),
    "qwen3_5_moe_text": Family(
        "Qwen3.5-MoE", _QWEN3_5_MOE_SHAPE, **_GATED, delta_net="split", moe=MoE(shared="size")
    ),
    "ministral": Family(
        "Ministral",
        _shape(32000, 4096, 14336, 32, 32, 8, max_position_embeddings=131072, sliding_window=4096),
        window_every=1,
    ),
    "phimoe": Family(
        "Phi-3.5-MoE",
        _shape(
            32064, 4096, 6400, 32, 32, 8, num_local_experts=16, num_experts_per_tok=2, max_position_embeddings=131072
        ),
        **_BY_ATTENTION_BIAS,
        **_LAYER_NORM,
        head_bias="lm_head_bias",
        moe=MoE(width=("intermediate_size",), linear_router=True),
    ),
    "exaone_moe": Family(
        "K-EXAONE",
        _shape(
            102400, 4096, 16384, 32, 32, 32, max_position_embeddings=2048, sliding_window=4096, num_experts=64,
            num_experts_per_tok=8, moe_intermediate_size=1024, num_shared_experts=1, first_k_dense_replace=1,
        ),
        qk_norm="dim",
        moe=MoE(count=("num_experts",), sparse="types", shared="count", shared_count="num_shared_experts",
            adapted=_PROJECTIONS),
        window_every=4,
    ),
    # Code of its own on the Hub (modeling_exaone.py); the names are those of its modules.
    "exaone": Family(
        "EXAONE 3",
        {"tie_word_embeddings": False},
        out="out_proj",
        mlp=("c_fc_0", "c_fc_1", "c_proj"),
    ),
    "granitemoe": Family(
        "Granite-MoE",
        _shape(
            32000, 4096, 11008, 32, 32, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048
        ),
        **_BY_ATTENTION_BIAS,
        moe=MoE(width=("intermediate_size",)),
    ),
    "minimax_m2": Family(
        "MiniMax-M2",
        _shape(
            200064, 3072, 1536, 62, 48, 8, head_dim=128, num_local_experts=256, num_experts_per_tok=8,
            max_position_embeddings=196608,
        ),
        qk_norm="width",
        moe=MoE(width=("intermediate_size",), adapted=("gate", "w1", "w3", "w2")),
    ),
    "flex_olmo": Family(
        "FlexOlmo",
        _shape(100352, 4096, 11008, 32, 32, num_experts=7, num_experts_per_tok=5, max_position_embeddings=4096),
        **_BY_ATTENTION_BIAS,
        qk_norm="width",
        moe=MoE(width=("intermediate_size",), count=("num_experts",), adapted=_PROJECTIONS),
    ),
    "nemotron": Family(
        "Nemotron", _shape(256000, 6144, 24576, 32, 48, max_position_embeddings=4096), **_BY_ATTENTION_BIAS,
        **_LAYER_NORM, mlp_bias="mlp_bias", mlp=("up_proj", "down_proj"),
    ),
    "apertus": Family(
        "Apertus",
        _shape(131072, 4096, 14336, 32, 32, max_position_embeddings=65536),
        **_BY_ATTENTION_BIAS,
        mlp=("up_proj", "down_proj"),
        qk_norm="dim",
        activation_parameters=2,
    ),
    "helium": Family(
        "Helium",
        _shape(48000, 2560, 7040, 24, 20, 20, head_dim=128, max_position_embeddings=4096),
        **_BY_ATTENTION_BIAS,
        mlp_bias="mlp_bias",
    ),
    "hunyuan_v1_dense": Family(
        "Hunyuan", _shape(290943, 4096, 11008, 32, 32, max_position_embeddings=2048), **_BY_ATTENTION_BIAS,
        qk_norm="dim",
    ),
    "cwm": Family("CWM", _shape(128256, 6144, 21504, 64, 48, 8, head_dim=128, max_position_embeddings=131072)),
    "qwen2_vl": Family("Qwen2-VL", _VL, **_QWEN2_VL),
    "qwen2_vl_text": Family("Qwen2-VL", _VL, **_QWEN2_VL),
    "qwen2_5_vl": Family("Qwen2.5-VL", _VL, **_QWEN2_VL),
    "qwen2_5_vl_text": Family("Qwen2.5-VL", _VL, **_QWEN2_VL),
    "qwen3_vl_text": Family(
        "Qwen3-VL",
        _shape(151936, 4096, 22016, 32, 32, 32, head_dim=128, max_position_embeddings=128000),
        **_BY_ATTENTION_BIAS,
        qk_norm="dim",
    ),
    "qwen3_vl_moe_text": Family(
        "Qwen3-VL-MoE",
        _shape(
            151936, 2048, 5632, 24, 16, 16, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
            decoder_sparse_step=1, max_position_embeddings=128000,
        ),
        **_BY_ATTENTION_BIAS,
        qk_norm="dim",
        moe=MoE(sparse="step"),
    ),
    "glm4v_text": Family(
        "GLM-4.1V",
        _shape(151552, 4096, 13696, 40, 32, 2, max_position_embeddings=32768),
        qkv_bias=True,
        mlp=("gate_up_proj", "down_proj"),
        fused_gate=True,
        norms=4,
    ),
    "glm4v_moe_text": Family(
        "GLM-4.5V",
        _shape(
            151424, 4096, 10944, 46, 96, 8, n_routed_experts=128, n_shared_experts=1, moe_intermediate_size=1408,
            first_k_dense_replace=1, num_experts_per_tok=8, max_position_embeddings=65536, attention_bias=True,
        ),
        qkv_bias="attention_bias",
        moe=MoE(count=("n_routed_experts",), sparse="first_dense", shared="count"),
    ),
}  # fmt: skip
