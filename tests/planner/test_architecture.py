"""Parameter counts against transformers and PEFT on the meta device, and against the published ones."""

from __future__ import annotations

import warnings

import pytest

from finetui.planner.architecture import Architecture
from finetui.planner.errors import ModelError, RecipeError
from finetui.planner.families import FAMILIES
from finetui.planner.hub import find_config, known_models

#: Small shapes with unequal widths, so that no two terms can stand in for each other.
SMALL = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GPT = {"vocab_size": 211, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128}
MOE = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
DEEPSEEK = {
    **SMALL, **MOE, "n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10, "num_key_value_heads": 6,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
FALCON = {key: value for key, value in SMALL.items() if key not in ("head_dim", "intermediate_size")}
FALCON["ffn_hidden_size"] = 80
GEMMA4 = {
    "num_hidden_layers": 8, "global_head_dim": 20, "hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": 199,
    "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "layer_types": ["sliding_attention", "full_attention"] * 4,
}  # fmt: skip
DELTA = {
    "linear_key_head_dim": 10, "linear_value_head_dim": 14, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 3, "head_dim": 12,
}  # fmt: skip
CASES = {
    "llama": SMALL,
    "llama tied, biased": {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama without head_dim": {key: value for key, value in SMALL.items() if key != "head_dim"},
    "llama4_text": {**SMALL, **MOE, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
    "llama4_text all sparse": {**SMALL, **MOE, "intermediate_size_mlp": 96},
    "arcee": {**SMALL, "mlp_bias": True},
    "ernie4_5": {**SMALL, "use_bias": True},
    "seed_oss": {**SMALL, "attention_out_bias": True, "mlp_bias": True},
    "olmoe": {**SMALL, **MOE, "head_dim": 8},
    "mistral": SMALL,
    "ministral3": SMALL,
    "mixtral": {**SMALL, **MOE},
    "qwen2": SMALL,
    "qwen2_moe": {**SMALL, **MOE, "shared_expert_intermediate_size": 36, "mlp_only_layers": [1]},
    "qwen3": SMALL,
    "qwen3_moe": {**SMALL, **MOE, "decoder_sparse_step": 2},
    "gemma": SMALL,
    "gemma2": SMALL,
    "gemma3_text": SMALL,
    "phi": {**SMALL, "head_dim": 8, "qk_layernorm": True},
    "phi3": SMALL,
    "smollm3": SMALL,
    "olmo": SMALL,
    "olmo2": SMALL,
    "olmo3": SMALL,
    "granite": SMALL,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": SMALL,
    "gptj": {**GPT, "rotary_dim": 4},
    "opt": {**SMALL, "ffn_dim": 80, "word_embed_proj_dim": 48},
    "falcon": FALCON,
    "falcon new decoder": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"vocab_size": 211, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 128},
    "stablelm": {**SMALL, "head_dim": 8, "use_qkv_bias": True, "qk_layernorm": True},
    "stablelm parallel": {**SMALL, "head_dim": 8, "use_parallel_residual": True},
    "starcoder2": {**SMALL, "head_dim": 8},
    "cohere": {**SMALL, "head_dim": 8, "use_qk_norm": True},
    "cohere2": SMALL,
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None},
    "deepseek_v3": DEEPSEEK,
    "glm": SMALL,
    "glm4": SMALL,
    "glm4_moe": {**DEEPSEEK, "use_qk_norm": True},
    "glm4_moe_lite": {key: value for key, value in DEEPSEEK.items() if key != "head_dim"},
    "gpt_oss": {**SMALL, **MOE},
    "exaone4": SMALL,
    "exaone_moe": {**SMALL, **MOE, "num_shared_experts": 2},
    "gemma4_text": {**SMALL, **GEMMA4},
    "gemma4_text with experts, keys as values": {
        **SMALL, **MOE, **GEMMA4, "enable_moe_block": True, "top_k_experts": 2, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    },
    "gemma4_unified_text": {**SMALL, "global_head_dim": 20, "num_hidden_layers": 7},
    "vaultgemma": SMALL,
    "qwen3_next": {**SMALL, **MOE, **DELTA, "shared_expert_intermediate_size": 36, "mlp_only_layers": [1]},
    "qwen3_5_text": {**SMALL, **DELTA, "num_hidden_layers": 6, "tie_word_embeddings": True},
    "qwen3_5_moe_text": {**SMALL, **MOE, **DELTA, "shared_expert_intermediate_size": 36},
    "ministral": SMALL,
    "phimoe": {**SMALL, **MOE, "lm_head_bias": True},
    "granitemoe": {**SMALL, **MOE},
    "minimax_m2": {**SMALL, **MOE},
    "flex_olmo": {**SMALL, **MOE, "head_dim": 8},
    "nemotron": {**SMALL, "mlp_bias": True},
    "apertus": SMALL,
    "helium": {**SMALL, "head_dim": 8},
    "hunyuan_v1_dense": SMALL,
    "cwm": SMALL,
    "bloom": {"vocab_size": 211, "hidden_size": 48, "n_layer": 3, "n_head": 6},
    "gpt_neo": {
        "vocab_size": 211, "hidden_size": 48, "num_layers": 4, "num_heads": 6, "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 2]],
    },
    "codegen": {**GPT, "rotary_dim": 4},
    "dots1": {key: value for key, value in DEEPSEEK.items() if "lora" not in key and key != "num_experts"},
}  # fmt: skip
#: Families of CASES under which transformers has no causal model of its own: towers of vision-language models, and code
#: on the Hub. Their counts are held below.
ELSEWHERE = {
    "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text",
    "glm4v_moe_text", "exaone", "qwen", "chatglm", "baichuan", "internlm", "internlm2", "minicpm", "RefinedWebModel",
    "RefinedWeb",
}  # fmt: skip


def _meta_model(config: dict):
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    config = dict(config)
    kind = config.pop("model_type")
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {kind}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))


@pytest.mark.parametrize("case", CASES)
def test_counts_equal_transformers_and_peft(case):
    from peft import LoraConfig, get_peft_model

    config = {"model_type": case.split()[0], **CASES[case]}
    architecture = Architecture.from_config(config, case)
    model = _meta_model(config)
    assert architecture.exact
    assert architecture.parameters == sum(p.numel() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert architecture.lora_parameters(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_every_family_has_a_case():
    assert {case.split()[0] for case in CASES} | ELSEWHERE == set(FAMILIES)


#: transformers' own defaults of these make no model: a head width or the number of experts is missing.
NO_DEFAULTS = {"ministral", "nemotron", "hunyuan_v1_dense", "dots1"}


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - ELSEWHERE - NO_DEFAULTS))
def test_keys_that_a_config_leaves_out_take_transformers_defaults(model_type):
    model = _meta_model({"model_type": model_type})
    architecture = Architecture.from_config({"model_type": model_type})
    assert architecture.parameters == sum(p.numel() for p in model.parameters())


def test_named_targets_equal_peft():
    from peft import LoraConfig, get_peft_model

    for case, targets in (("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_proj"]), ("phi3", ["qkv_proj"])):
        config = {"model_type": case, **CASES[case]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(_meta_model(config), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert Architecture.from_config(config).lora_parameters(4, targets) == trainable


@pytest.mark.parametrize(
    "kind",
    [
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "glm4v_moe", "gemma3", "gemma4",
        "mistral3", "paligemma", "llava", "smolvlm", "internvl", "cohere2_vision",
    ],
)  # fmt: skip
def test_text_towers_equal_transformers(kind):
    """The tower and the head of the whole model, which are what a text alone passes through."""
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {kind}")
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    tower = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
    sizes = {id(p): p.numel() for part in (tower, model.lm_head) for p in part.parameters()}
    architecture = Architecture.from_config(config.to_dict(), kind)
    assert architecture.exact
    assert architecture.parameters == sum(sizes.values())


def test_exaone_3_has_its_published_count():
    shape = {
        "model_type": "exaone", "vocab_size": 102400, "hidden_size": 4096, "num_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "tie_word_embeddings": False,
    }  # fmt: skip
    architecture = Architecture.from_config(shape, "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct")
    assert (architecture.parameters, architecture.exact) == (7_818_448_896, True)


#: What models whose code is on the Hub say of themselves, and their published counts.
_LIKE_LLAMA_2 = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_GLM = {
    "model_type": "chatglm", "hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32,
    "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 128, "rmsnorm": True,
    "add_bias_linear": False, "add_qkv_bias": True,
}  # fmt: skip
_WEB = {"vocab_size": 65024, "parallel_attn": True, "bias": False, "alibi": False}
REMOTE_COUNTS = {
    "Qwen/Qwen-7B": (
        {**_LIKE_LLAMA_2, "model_type": "qwen", "intermediate_size": 22016, "vocab_size": 151936, "no_bias": True},
        7_721_324_544,
    ),
    "THUDM/chatglm3-6b": ({**_GLM, "num_layers": 28, "padded_vocab_size": 65024}, 6_243_584_000),
    "THUDM/glm-4-9b-chat": ({**_GLM, "num_layers": 40, "padded_vocab_size": 151552}, 9_399_951_360),
    "baichuan-inc/Baichuan2-7B-Base": (
        {**_LIKE_LLAMA_2, "model_type": "baichuan", "vocab_size": 125696}, 7_505_973_248,
    ),
    "internlm/internlm2-7b": (
        {**_LIKE_LLAMA_2, "model_type": "internlm2", "intermediate_size": 14336, "num_key_value_heads": 8,
         "vocab_size": 92544, "bias": False},
        7_737_708_544,
    ),
    "tiiuae/falcon-7b of 2023": (
        {**_WEB, "model_type": "RefinedWebModel", "hidden_size": 4544, "n_layer": 32, "n_head": 71},
        6_921_720_704,
    ),
    "tiiuae/falcon-40b of 2023": (
        {**_WEB, "model_type": "RefinedWeb", "hidden_size": 8192, "n_layer": 60, "n_head": 128, "n_head_kv": 8},
        41_303_293_952,
    ),
    "bigscience/bloom-7b1": (
        {"model_type": "bloom", "n_embed": 4096, "n_layer": 30, "num_attention_heads": 32, "vocab_size": 250880},
        7_069_016_064,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REMOTE_COUNTS)
def test_models_with_code_on_the_hub_have_their_published_counts(name):
    config, count = REMOTE_COUNTS[name]
    architecture = Architecture.from_config(config, name)
    assert (architecture.parameters, architecture.exact) == (count, True)


def test_the_text_tower_of_a_vision_model_is_what_counts():
    tower = {"model_type": "gemma3_text", **SMALL}
    whole = {"model_type": "gemma3", "text_config": dict(SMALL), "vision_config": {"hidden_size": 999}}
    assert Architecture.from_config(whole).parameters == Architecture.from_config(tower).parameters


#: Published parameter counts: the size that each model's page on the Hub gives for its safetensors files, tied
#: weights once; without the vision tower for Gemma 3 from 4b on, and without the routing biases of DeepSeek-V3.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-pt": 3_880_263_168,
    "google/gemma-3-12b-pt": 11_766_034_176,
    "google/gemma-3-27b-pt": 27_009_346_304,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "ibm-granite/granite-3.3-2b-base": 2_533_539_840,
    "ibm-granite/granite-3.3-8b-base": 8_170_864_640,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "deepseek-ai/DeepSeek-V3": 671_026_404_352,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "tiiuae/falcon-7b": 6_921_720_704,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "bigcode/starcoder2-7b": 7_173_923_840,
    "bigcode/starcoder2-15b": 15_957_889_024,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "openai-community/gpt2": 124_439_808,
    "CohereLabs/c4ai-command-r-v01": 34_980_831_232,
    "CohereLabs/c4ai-command-r7b-12-2024": 8_028_033_024,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
}


def test_presets_have_their_published_counts():
    assert {name for name, _ in known_models().values()} == set(PUBLISHED)
    for name, count in PUBLISHED.items():
        architecture = Architecture.from_config(find_config(name)[1], name)
        assert (name, architecture.parameters, architecture.exact) == (name, count, True)


def test_breakdown_adds_up_and_moe_is_sparse():
    architecture = Architecture.from_config(find_config("Qwen/Qwen3-30B-A3B")[1])
    assert sum(architecture.breakdown.values()) == architecture.parameters
    assert 3.2e9 < architecture.active_parameters < 3.5e9 < architecture.parameters


def test_experts_of_an_unknown_family_are_read_by_its_shapes():
    known = {key: value for key, value in DEEPSEEK.items() if "lora" not in key}
    names = {
        "model_type": "brandnew", "n_routed_experts": 0, "num_experts": 0, "num_local_experts": 0,
        "num_experts_per_tok": None, "n_shared_experts": 0, "first_k_dense_replace": None, "moe_num_experts": 6,
        "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
    }  # fmt: skip
    unknown = {key: value for key, value in {**known, **names}.items() if value is not None}
    del unknown["num_experts"], unknown["num_local_experts"], unknown["n_routed_experts"]
    read = Architecture.from_config(unknown, "x")
    like = Architecture.from_config({"model_type": "dots1", **known}, "y")
    assert not read.exact
    assert read.expert_weights == like.expert_weights > 0
    assert [layer.count for layer in read.layers] == [1, 3]


def test_an_unknown_family_is_read_by_its_shapes_and_says_so():
    architecture = Architecture.from_config({"model_type": "brandnew", **SMALL}, "x")
    assert not architecture.exact
    assert "brandnew" in architecture.note
    assert architecture.parameters == Architecture.from_config({"model_type": "llama", **SMALL}).parameters


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert", **SMALL}, "bert is no decoder-only"),
        ({"model_type": "t5", "is_encoder_decoder": True, **SMALL}, "no decoder-only"),
        ({"_class_name": "UNet2DConditionModel"}, "diffusion"),
        ({}, "hidden_size, num_hidden_layers, num_attention_heads, vocab_size missing"),
        ({"model_type": "llama", **SMALL, "hidden_size": "48"}, "hidden_size must be a whole number above 0, not '48'"),
        ({"model_type": "llama", **SMALL, "num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        ({"model_type": "llama", **SMALL, "num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        ({"model_type": "llama", **SMALL, "head_dim": "x"}, "head_dim must be a whole number"),
        ({"model_type": "llama", **SMALL, "intermediate_size": -5}, "intermediate_size must be a whole number"),
    ],
)
def test_what_can_not_be_trained_is_refused_by_name(config, words):
    with pytest.raises(ModelError, match=words):
        Architecture.from_config(config, "x")


def test_unknown_targets_are_refused_with_the_known_ones():
    architecture = Architecture.from_config({"model_type": "llama", **SMALL}, "x")
    with pytest.raises(RecipeError, match=r"no linear module named 'qq_proj'.*down_proj, gate_proj, k_proj"):
        architecture.lora_parameters(8, ["q_proj", "qq_proj"])
    mixtral = Architecture.from_config({"model_type": "mixtral", **CASES["mixtral"]}, "m")
    with pytest.raises(RecipeError, match="w1 and w3 are one fused weight"):
        mixtral.lora_parameters(8, ["w1"])


def test_a_plan_tells_parameters_by_module():
    from finetui.planner.hardware import Node, find_gpu
    from finetui.planner.recipe import Recipe
    from finetui.planner.solver import make_plan

    name, config, _ = find_config("Qwen/Qwen3-30B-A3B")
    plan = make_plan(Recipe(model=name), Architecture.from_config(config, name), Node(find_gpu("H200")))
    assert sum(plan.model.modules.values()) == plan.model.parameters
    assert plan.model.modules["experts"] > 0.9 * plan.model.parameters
