"""The table of families, concluded: models that bring their own code on the Hub, and older ones of transformers.

Sources: the ``modeling_*.py`` beside each model's weights on the Hub, whose module names these are, and transformers
5.23 for ``bloom``, ``gpt_neo``, ``codegen`` and ``dots1``.
"""

from __future__ import annotations

from typing import Any

from .family import Family, MoE
from .family import shape_defaults as _shape

_LAYER_NORM: dict[str, Any] = {"norm": "layer"}
_TIED = {"tie_word_embeddings": True}
_PLAIN_MLP = ("dense_h_to_4h", "dense_4h_to_h")
#: Falcon before transformers had it.
_REFINED_WEB: dict[str, Any] = {
    **_LAYER_NORM, "qkv_bias": "bias", "out_bias": "bias", "mlp_bias": "bias", "qkv": ("query_key_value",),
    "out": "dense", "mlp": _PLAIN_MLP,
}  # fmt: skip

REMOTE: dict[str, Family] = {
    "qwen": Family(
        "Qwen 1", {"tie_word_embeddings": False}, qkv=("c_attn",), out="c_proj", mlp=("w1", "w2", "c_proj"),
        qkv_bias=True, halved_inner=True,
    ),
    "chatglm": Family(
        "ChatGLM", {"tie_word_embeddings": False}, qkv=("query_key_value",), out="dense", mlp=_PLAIN_MLP,
        fused_gate=True, qkv_bias="add_qkv_bias", out_bias="add_bias_linear", mlp_bias="add_bias_linear",
    ),
    "baichuan": Family("Baichuan", {"tie_word_embeddings": False}, qkv=("W_pack",)),
    "internlm": Family("InternLM", {"tie_word_embeddings": False, "bias": True}, qkv_bias="bias", out_bias="bias"),
    "internlm2": Family(
        "InternLM 2", {"tie_word_embeddings": False}, qkv=("wqkv",), out="wo", mlp=("w1", "w3", "w2"),
        qkv_bias="bias", out_bias="bias",
    ),
    "minicpm": Family("MiniCPM", _TIED),
    "RefinedWebModel": Family("Falcon", {"multi_query": True, "parallel_attn": True, **_TIED}, **_REFINED_WEB),
    "RefinedWeb": Family("Falcon", {"multi_query": True, "new_decoder_architecture": True, **_TIED}, **_REFINED_WEB),
    "bloom": Family(
        "BLOOM", _shape(250880, 64, None, 2, 8, **_TIED), plain_heads=True, **_LAYER_NORM, qkv_bias=True,
        out_bias=True, mlp_bias=True, qkv=("query_key_value",), out="dense", mlp=_PLAIN_MLP, embedding_norm=True,
    ),
    "gpt_neo": Family(
        "GPT-Neo", _shape(50257, 2048, None, 24, 16, max_position_embeddings=2048, **_TIED), plain_heads=True,
        **_LAYER_NORM, out_bias=True, mlp_bias=True, out="out_proj", mlp=("c_fc", "c_proj"),
        positions="max_position_embeddings",
    ),
    "codegen": Family(
        "CodeGen", _shape(50400, 4096, None, 28, 16, n_positions=2048), plain_heads=True, **_LAYER_NORM, norms=1,
        mlp_bias=True, qkv=("qkv_proj",), out="out_proj", mlp=("fc_in", "fc_out"), head_bias=True,
    ),
    "dots1": Family(
        "dots.llm1",
        _shape(
            152064, 4608, 10944, 62, 32, 32, moe_intermediate_size=1408, num_experts_per_tok=6,
            max_position_embeddings=2048,
        ),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="dim",
        moe=MoE(
            count=("n_routed_experts",), sparse="first_dense", shared="count",
            adapted=("gate", "gate_proj", "up_proj", "down_proj"),
        ),
    ),
}  # fmt: skip
