"""Loading in e4m3: what is quantised, what stays, that nothing of the loader remains, and that adapters fit."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from finetui.engine.models.quantize import fp8_config, not_in_8_bits
from finetui.kernels import fp8

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture(params=[(LlamaConfig, False), (Qwen2Config, True)], ids=["llama", "qwen2, tied"])
def stored(request, tmp_path):
    kind, tied = request.param
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES, tie_word_embeddings=tied)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def load(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=fp8_config(), output_loading_info=True
    )


def test_all_linear_layers_but_the_head_are_quantised_and_nothing_is_missing(stored):
    model, folder = stored
    loaded, info = load(folder)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = dict(model.named_modules())
    for path, module in loaded.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, fp8.FP8Linear) == (path != "lm_head"), path
        if isinstance(module, fp8.FP8Linear):
            expected = weights[path].weight
            distance = (fp8.dequantise(module.state).float() - expected.float()).norm() / expected.float().norm()
            assert distance < 0.03
            if module.bias is not None:
                assert torch.equal(module.bias, weights[path].bias)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (loaded(ids).logits - model(ids).logits).norm() < 0.1 * model(ids).logits.norm()


def test_layers_of_one_input_lie_side_by_side(stored):
    loaded, _ = load(stored[1])
    for layer in loaded.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert fp8.joined([attention.q_proj.state, attention.k_proj.state, attention.v_proj.state]) is not None
        assert fp8.joined([mlp.gate_proj.state, mlp.up_proj.state]) is not None


def test_nothing_of_the_loader_stays_with_the_model_and_adapters_train(stored):
    loaded, _ = load(stored[1])
    assert not getattr(loaded, "is_quantized", False)
    assert "quantization_config" not in loaded.config.to_dict()
    loaded.requires_grad_(False)
    adapted = get_peft_model(loaded, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.dtype == torch.float32 for p in trained.values())
    ids = torch.arange(20)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


def test_why_products_are_not_in_8_bits_is_told(stored, monkeypatch):
    loaded, _ = load(stored[1])
    narrow = nn.Sequential(fp8.FP8Linear.of(nn.Linear(16, 24)), fp8.FP8Linear.of(nn.Linear(16, 32)))
    monkeypatch.setattr(fp8, "multiplies", lambda device: False)  # Triton's interpreter would
    assert "does not multiply" in not_in_8_bits(loaded, torch.bfloat16)
    monkeypatch.setattr(fp8, "multiplies", lambda device: True)
    monkeypatch.setattr(fp8, "proven", lambda device: True)
    assert not_in_8_bits(loaded, torch.bfloat16) == ""
    assert "float16" in not_in_8_bits(loaded, torch.float16)
    assert "1 of 2" in not_in_8_bits(narrow, torch.bfloat16)
