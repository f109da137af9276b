"""A recipe for each common family of models: it plans for a rented GPU, and trains on a tiny model of that shape."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from finetui.engine.planning import plan_for
from finetui.planner.hub import find_config
from finetui.planner.recipe import Recipe

PRESETS = Path(__file__).parents[2] / "presets"
FAMILIES = (
    "llama", "llama-70b", "qwen2.5", "qwen3", "qwen3-moe", "gemma2", "gemma3", "mistral", "mixtral", "phi4", "gpt-oss",
    "deepseek", "smollm3", "olmo2", "granite", "glm4", "command-r",
)  # fmt: skip
#: What is made small; all else in a config (what is tied, capped, scaled, biased, shared, left out) stays.
SMALL = {
    "vocab_size": 1800, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 256,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "sliding_window": 64,
    "query_pre_attn_scalar": 16,
}  # fmt: skip


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same architecture at a few thousand parameters per layer."""
    small = {key: SMALL.get(key, value) if value is not None else None for key, value in config.items()}
    if config["num_key_value_heads"] < config["num_attention_heads"]:
        small["num_key_value_heads"] = 2
    else:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "layer_types" in small:
        small["layer_types"] = small["layer_types"][-2:]
    return {**small, "dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    small = shrunk(config)
    torch.manual_seed(0)
    made = AutoConfig.for_model(**small)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PRESETS / "tiny" / file, folder)
    assert len(AutoTokenizer.from_pretrained(folder)) <= made.vocab_size


@pytest.mark.parametrize("family", FAMILIES)
def test_plans(family: str) -> None:
    recipe = Recipe.load(PRESETS / f"{family}.yaml", overrides=["hardware.gpu=H200"])
    assert plan_for(recipe).fits
    assert (PRESETS / f"{family}.yaml").read_text().startswith("# ")


def test_seventy_billion_parameters_fit_a_card_of_80_gb() -> None:
    assert plan_for(Recipe.load(PRESETS / "llama-70b.yaml", overrides=["hardware.gpu=H100"])).fits


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_on_a_tiny_model_of_its_shape(family: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import torch

    from finetui.engine.events import read_events
    from finetui.engine.run import Run
    from finetui.engine.worker import attempt

    torch.set_num_threads(1)
    asked = Recipe.load(PRESETS / f"{family}.yaml")
    config = find_config(asked.model)[1]
    write_model(tmp_path / "model", config)
    recipe = asked.with_overrides({
        "model": str(tmp_path / "model"), "hardware.device": "cpu", "max_steps": 3, "batch_size": 8,
        "sequence_length": 128, "evaluation.every": 3, "track": [], "optimizer.learning_rate": 1e-2,
    })  # fmt: skip
    run = Run.create(recipe, plan_for(recipe), root=tmp_path)
    assert attempt(run) == 0, run.events_path.read_text()
    told = list(read_events(run.events_path))
    steps = [event.data for event in told if event.type == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["grad_norm"] > 0 for step in steps)
    held_out = [event.data["loss"] for event in told if event.type == "eval"]
    assert held_out[-1] < held_out[0]
    assert (run.output_path / "adapter_model.safetensors").is_file()
    assert not [event.data for event in told if event.type == "warning"]
