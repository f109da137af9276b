"""Adapters over their base, read tensor by tensor, are what PEFT merges in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetui.engine.merge.make import merge, prepare
from finetui.engine.merge.recipe import MergeRecipe
from finetui.engine.merge.sources import find
from finetui.planner.errors import ModelError


def adapter(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter with random pairs, written by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(**{"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6, **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += (0.05 if "magnitude" in name else 0.1) * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}},
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "v_proj"], "bias": "none"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "patterns", "dora", "embedding", "whole"],
)
def test_what_is_read_is_what_peft_merges(
    model_folder: Callable[[str], Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = model_folder("llama")
    folder = adapter(base, tmp_path / "adapter", 1, **options)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    wanted = merged.state_dict()
    source = find(str(folder))
    changed = 0
    plain = find(str(base))
    for name in source.tensors:
        torch.testing.assert_close(source.read(name), wanted[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(source.read(name), plain.read(name))
    assert changed >= 3


def test_one_adapter_becomes_a_model(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = adapter(model_folder("llama"), tmp_path / "adapter", 1)
    (folder / "chat_template.jinja").write_text("of the adapter")
    made = merge(
        prepare(MergeRecipe.build({"method": "passthrough", "models": [{"model": str(folder)}]}, source="x")),
        tmp_path / "out",
    )
    got, source = load_file(made.path / "model.safetensors"), find(str(folder))
    assert all(torch.equal(got[name], source.read(name)) for name in source.tensors)
    assert (made.path / "chat_template.jinja").read_text() == "of the adapter"
    assert not (made.path / "adapter_config.json").exists()
    assert (made.path / "tokenizer.json").is_file()
    again, _ = MergeRecipe.load(made.path / "merge.yaml")
    assert again.made is not None
    assert again.made.sources[str(folder)].keys() == {"model.safetensors", "adapter_model.safetensors"}


def test_what_is_no_sum_of_pairs(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = adapter(model_folder("llama"), tmp_path / "adapter", 1)
    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())

    def write(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    first = next(name for name in weights if "lora_A" in name)
    for tensors, changes, what in (
        (weights, {"peft_type": "IA3"}, "IA3 is no sum of pairs"),
        (weights | {"base_model.model.x.token_adapter.delta": torch.ones(1)}, {}, "no part of a pair"),
        ({first: weights[first]}, {}, "is not whole"),
        ({name.replace("self_attn", "attn"): t for name, t in weights.items()}, {}, "stores no weight under that name"),
        (weights | {"base_model.model.strange.weight": torch.ones(1)}, {}, "which the base does not store"),
    ):
        write(tensors, **changes)
        with pytest.raises(ModelError, match=what):
            _ = find(str(folder)).tensors
    write({name: t[:, :-1].contiguous() if "lora_A" in name else t for name, t in weights.items()})
    source = find(str(folder))
    name = next(name for name in source.tensors if "q_proj" in name)
    with pytest.raises(ModelError, match="in the base and"):
        source.read(name)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        find(str(folder))
