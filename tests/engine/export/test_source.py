"""Merging tensor by tensor gives the files that PEFT's merge of the whole model gives, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from safetensors.torch import load_file

from finetui.engine.export import export, merged, source
from finetui.engine.run import Run
from finetui.engine.worker import attempt
from finetui.planner.errors import ModelError

MakeRun = Callable[..., Run]


def both_ways(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The run merged as a stream, and merged whole."""
    assert attempt(run) == 0
    assert merged.streamed(run, Path(run.recipe.model), run.output_path) is not None
    streamed = export(run, "merged", folder / "streamed").path
    monkeypatch.setattr(merged, "streamed", lambda *_: None)
    return streamed, export(run, "merged", folder / "whole").path


@pytest.mark.parametrize(
    ("family", "plan"), [("llama", {}), ("gemma", {"precision": "bf16"}), ("qwen3", {"tuning": "qlora"})]
)
def test_a_stream_is_what_peft_makes(
    family: str, plan: dict[str, Any], training_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, whole = both_ways(training_run(family, **{"steps": 2, **plan}), tmp_path, monkeypatch)
    assert sorted(path.name for path in streamed.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.glob("*.json*"):
        if path.name != "model.safetensors":
            assert json.loads((streamed / path.name).read_text()) == json.loads(path.read_text()), path.name
    found, wanted = load_file(streamed / "model.safetensors"), load_file(whole / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_files_of_bounded_size(training_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(merged, "SHARD", 100_000)
    streamed, whole = both_ways(training_run(steps=1), tmp_path, monkeypatch)
    shards = sorted(streamed.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 110_000 for path in shards)
    found, wanted = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (streamed, whole))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"},
                                  {"init_lora_weights": "pissa"}, {"peft_type": "LOHA"}])  # fmt: skip
def test_what_is_more_than_a_product_is_left_to_peft(more: dict[str, Any], family: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    _, base = family("llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    assert source.merging(base, tmp_path) is not None
    told = tmp_path / "adapter_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | more))
    assert source.merging(base, tmp_path) is None


def test_each_module_has_its_own_scale(family: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    _, base = family("llama")
    options: dict[str, Any] = {
        "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True, "init_lora_weights": False,
    }  # fmt: skip
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "k_proj", "v_proj"], **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    found = source.merging(base, tmp_path)
    assert found is not None
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    wanted = loaded.merge_and_unload().state_dict()
    assert all(torch.equal(found.read(name), wanted[name]) for name in found.stored)
    assert len(found.pairs) == 6


def test_an_adapter_that_diverged_is_refused(family: Any, tmp_path: Path) -> None:
    _, base = family("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    pair = source.Pair(torch.full((2, 64), float("nan")), torch.ones(64, 2), 1.0)
    with pytest.raises(ModelError, match="not all finite"):
        source.Source(source.of_folder(base).stored, {name: pair}).read(name)


def test_weights_in_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not plain numbers"):
        source.of_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + b"\0" * 30)
    with pytest.raises(ModelError, match="can't be read"):
        source.of_folder(tmp_path)
