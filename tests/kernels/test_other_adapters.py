"""Adapters of PEFT that are no plain LoRA are left to PEFT, with the reason told, and compute what they did before."""

from __future__ import annotations

import warnings

import pytest
import torch

from finetui.kernels.patch import patch_model, unpatch

peft = pytest.importorskip("peft")

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
PLACED = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(**PLACED, r=4, init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(**PLACED, r=4, use_dora=True, init_lora_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(**PLACED, init_r=4, target_r=2, total_step=10),
    "ia3": lambda: peft.IA3Config(**PLACED, feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(**PLACED, r=8),
    "oft": lambda: peft.OFTConfig(**PLACED, oft_block_size=8),
    "loha": lambda: peft.LoHaConfig(**PLACED, r=4),
    "lokr": lambda: peft.LoKrConfig(**PLACED, r=4),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_no_plain_lora_is_left_and_computes_the_same(name: str, device: torch.device) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE)).to(device)
        model = peft.get_peft_model(base, ADAPTERS[name]()).to(device).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    words = torch.arange(12, device=device)[None]
    with torch.no_grad():
        before = model(input_ids=words).logits
        report = patch_model(model)
        after = model(input_ids=words).logits
    unpatch(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    whole = {item.replaced for item in report.items if item.kernel == "decoder_layer"}
    assert whole == {name in ("lora", "prompt", "prefix")}, "the last two put nothing into a layer"
    assert all(item.why for item in report.left)
