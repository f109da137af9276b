"""A GGUF file computes what the checkpoint does: in llama.cpp where it is here, and in transformers' own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetui.engine.export import source
from finetui.engine.export.exported import say_nothing
from finetui.engine.export.gguf_file import Layout, lay_out, write
from finetui.engine.export.gguf_tokenizer import NASTY
from finetui.planner.errors import ModelError

Make = Callable[..., tuple[Any, Path]]
IDS = [int(i) for i in torch.randint(5, 300, (60,), generator=torch.Generator().manual_seed(3))]
SLIDING = {"sliding_window": 16, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 32}),
    "llama with biases, tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "yarn": ("qwen2", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {**SLIDING, "num_hidden_layers": 4}),
    "gemma3": ("gemma3_text", {**SLIDING, "num_hidden_layers": 7, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "phi3 longrope": ("phi3", {
        "sliding_window": None, "max_position_embeddings": 2048, "original_max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + i for i in range(8)],
                            "long_factor": [2.0 + i for i in range(8)]}}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 8, "head_dim": 32}),
    "granite": ("granite", {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
}  # fmt: skip


def laid_out(folder: Path, tokenizer: Any, quant: str = "f32") -> Layout:
    found = source.of_folder(folder)
    config = AutoConfig.from_pretrained(folder)
    return lay_out(config, tokenizer, found.shapes, quant, torch.float32, "a model")


def written(folder: Path, tokenizer: Any, path: Path, quant: str = "f32") -> Layout:
    layout = laid_out(folder, tokenizer, quant)
    write(layout, source.of_folder(folder), path, say_nothing)
    return layout


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(
    name: str, family: Make, byte_level: Any, llama_cpp: Any, tmp_path: Path
) -> None:
    kind, shape = FAMILIES[name]
    model, folder = family(kind, **shape)
    written(folder, byte_level(), tmp_path / "m.gguf")
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0, -1].numpy()
    found = llama_cpp(tmp_path / "m.gguf").logits(IDS)
    # llama.cpp keeps keys and values in f16: an exchange of rows or a norm without its 1 is off by about 1
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    assert found.argmax() == wanted.argmax()


@pytest.mark.parametrize("name", ["llama", "llama 3 rope", "qwen2", "phi3"])
@pytest.mark.parametrize(("quant", "off"), [("f32", 0.0), ("f16", 5e-3), ("bf16", 5e-2), ("q8_0", 0.2)])
def test_transformers_reads_what_was_written(
    name: str, quant: str, off: float, family: Make, byte_level: Any, tmp_path: Path
) -> None:
    kind, shape = FAMILIES[name]
    plain = {key: value for key, value in shape.items() if not key.startswith(("rope", "partial"))}  # not read back
    model, folder = family(kind, **plain)
    layout = written(folder, byte_level(), tmp_path / "m.gguf", quant)
    assert (tmp_path / "m.gguf").stat().st_size < layout.bytes < (tmp_path / "m.gguf").stat().st_size + 2 * 2**20
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted, found = model(torch.tensor([IDS])).logits, again(torch.tensor([IDS])).logits
    assert (found - wanted).abs().max() <= off * wanted.abs().max()


def test_transformers_reads_the_tokenizer(family: Make, byte_level: Any, tmp_path: Path) -> None:
    tokenizer = byte_level()
    written(family("llama")[1], tokenizer, tmp_path / "m.gguf")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert again.convert_ids_to_tokens(range(320)) == tokenizer.convert_ids_to_tokens(range(320))
    for text in (text for text in NASTY if not text[0].isspace()):  # transformers 5.17 drops a space there
        assert again(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]


def test_what_llama_cpp_reads_beside_weights(family: Make, byte_level: Any, tmp_path: Path) -> None:
    kind, shape = FAMILIES["gemma3"]
    model, folder = family(kind, **shape)
    written(folder, byte_level(), tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    told = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": "gemma3", "gemma3.block_count": 7, "gemma3.attention.key_length": 16,
        "gemma3.attention.sliding_window": 16, "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0,
        "gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 1e4, "gemma3.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: told[key] for key in expected} == expected
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    norm = model.model.layers[0].self_attn.q_norm.weight.detach().numpy()
    assert np.array_equal(tensors["blk.0.attn_q_norm.weight"].data, norm + 1)
    assert "output.weight" not in tensors


@pytest.mark.parametrize(
    ("kind", "shape", "why"),
    [
        ("gpt2", {}, "no GGUF can be written here for the architecture gpt2"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("qwen2", {"head_dim": 32}, "heads are 32 wide"),
        ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 99}, r"1 / sqrt\(99\)"),
        ("gemma3_text", {**SLIDING, "layer_types": ["full_attention"] * 2}, "slide in another order"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "without rope"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("qwen2", {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.5,
            "original_max_position_embeddings": 64}}, "scales attention by 1.5"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, shape: dict[str, Any], why: str, byte_level: Any
) -> None:
    config = AutoConfig.for_model(kind, **{**({} if kind == "gpt2" else SHAPE_16), **shape})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=why) as caught:
        lay_out(config, byte_level(), shapes, "f16", torch.float32, "a model")
    assert "convert_hf_to_gguf.py" in caught.value.do


SHAPE_16 = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def test_a_tensor_without_a_place_is_refused(family: Make, byte_level: Any) -> None:
    _, folder = family("llama")
    shapes = {**source.of_folder(folder).shapes, "model.layers.0.mlp.gizmo.weight": (4, 4)}
    with pytest.raises(ModelError, match=r"no place for the tensor model\.layers\.0\.mlp\.gizmo\.weight"):
        lay_out(AutoConfig.from_pretrained(folder), byte_level(), shapes, "f16", torch.float32, "a model")


def test_a_window_that_llama_cpp_ignores_is_told(family: Make, byte_level: Any) -> None:
    _, folder = family("mistral", sliding_window=64)
    assert any("64 tokens" in note for note in laid_out(folder, byte_level()).notes)


@pytest.mark.parametrize("name", ["phi3", "my-Phi-3-run", "modern-bert"])
def test_names_that_llama_cpp_acts_on_are_changed(
    name: str, family: Make, byte_level: Any, llama_cpp: Any, tmp_path: Path
) -> None:
    _, folder = family("llama")
    found = source.of_folder(folder)
    layout = lay_out(AutoConfig.from_pretrained(folder), byte_level(), found.shapes, "f16", torch.float32, name)
    write(layout, found, tmp_path / "m.gguf", say_nothing)
    llama_cpp(tmp_path / "m.gguf")  # which looks for tokens of Phi-3 by that name, and fails without them
