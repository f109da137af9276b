"""Architectures of many families: patched, they give the numbers of their own code, and what is left says why."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetui.kernels.patch import fallbacks, patch_model
from finetui.planner.fused import FAMILIES as planner_families

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SINGLE = {"lora", "rms_norm", "rope", "glu"}
WHOLE = SINGLE | {"decoder_layer"}
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
#: What is replaced; of what is left of a layer, the reason.
FAMILIES = [
    ("llama", {}, WHOLE, ""),
    ("gemma", {}, WHOLE, ""),
    ("granite", {}, WHOLE, ""),
    ("granite", {"residual_multiplier": 0.3}, WHOLE, ""),
    ("smollm3", {}, WHOLE, ""),
    ("smollm3", {"no_rope_layers": [0]}, WHOLE, ""),
    ("helium", {}, WHOLE, ""),
    ("ernie4_5", {}, WHOLE, ""),
    *((family, {}, WHOLE, "") for family in ("ministral", "mistral", "qwen2", "qwen3")),
    ("gemma2", {"attn_implementation": "eager"}, SINGLE, "caps its scores"),
    ("gemma3_text", {"sliding_window": 3}, WHOLE, ""),
    ("gemma4_text", {"hidden_size_per_layer_input": 0}, SINGLE - {"rope"}, "tensors of its own (layer_scalar)"),
    ("phi3", {}, WHOLE, ""),
    ("olmo2", {}, WHOLE, ""),
    ("olmo3", {"sliding_window": 3}, WHOLE, ""),
    ("exaone4", {}, WHOLE, ""),
    ("exaone4", {"sliding_window": 3, "layer_types": ["full_attention"]}, WHOLE, ""),
    ("cohere", {}, SINGLE - {"rms_norm"}, "it has no post_attention_layernorm"),
    ("glm", {}, WHOLE, ""),
    ("glm4", {}, WHOLE, ""),
    ("starcoder2", {}, {"lora", "rope"}, "its LayerNorm is no RMSNorm"),
    ("arcee", {}, {"lora", "rope", "rms_norm"}, "its MLP is no GLU"),
    ("hunyuan_v1_dense", {}, WHOLE, ""),
    ("mixtral", EXPERTS, {"lora", "rope", "rms_norm"}, "its MLP is no GLU"),
    ("qwen3_moe", EXPERTS, {"lora", "rope", "rms_norm"}, "its MLP is no GLU"),
]


def test_the_planner_counts_on_whole_layers_where_they_are_recognised():
    assert {family for family, _, kernels, _ in FAMILIES if kernels == WHOLE} == set(planner_families)


@pytest.mark.parametrize(
    ("family", "changes", "kernels", "why"), FAMILIES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_patched_is_stock_and_what_is_left_says_why(device, family, changes, kernels, why):
    torch.manual_seed(0)
    implementation = changes.get("attn_implementation", "sdpa")
    settings = {name: value for name, value in (SIZES | changes).items() if name != "attn_implementation"}
    config = AutoConfig.for_model(family, **settings)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(device)
    base.requires_grad_(False)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora).train()
    ids = torch.arange(12, device=device).reshape(2, 6) % 32

    def step():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stock = step()
    report = patch_model(model)
    assert {item.kernel for item in report.replaced} == kernels, report.summary()
    assert all(item.why for item in report.left)
    left = [item.why for item in report.left if item.kernel == "decoder_layer"]
    assert len(left) == (1 if why else 0)
    assert not why or why in left[0]
    mine = step()
    assert mine[1].keys() == stock[1].keys()
    assert torch.allclose(mine[0], stock[0], atol=1e-5)
    for name, expected in stock[1].items():
        assert (mine[1][name] - expected).norm() <= 2e-5 * expected.norm() + 1e-9, name
    assert fallbacks(model) == []
