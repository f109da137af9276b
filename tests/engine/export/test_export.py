"""Exports load elsewhere and compute what was trained; nothing is overwritten or left half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from finetui.engine import output
from finetui.engine.export import export_run
from finetui.engine.run import Run
from finetui.engine.worker import attempt
from finetui.planner.errors import RunError, TrainingError

MakeRun = Callable[..., Run]
IDS = torch.arange(5, 45).view(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_merged_computes_what_base_and_adapter_do(training_run: MakeRun, tmp_path: Path, family: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = training_run(family, steps=3)
    assert attempt(run) == 0
    adapter = export_run(run, "adapter", tmp_path / "adapter")
    merged = export_run(run, "merged", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model)
    untouched = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, str(adapter)))
    found = logits(AutoModelForCausalLM.from_pretrained(merged))
    assert torch.allclose(found, tuned, atol=1e-5)
    assert not torch.allclose(found, untouched, atol=1e-2)
    assert AutoTokenizer.from_pretrained(merged).chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    assert not list(merged.glob("adapter*"))


def test_qlora_merges_into_the_base_as_it_is_stored(training_run: MakeRun, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = training_run(tuning="qlora", steps=2, precision="bf16")
    assert attempt(run) == 0
    merged = AutoModelForCausalLM.from_pretrained(export_run(run, "merged", tmp_path / "m"))
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model)
    assert not hasattr(merged.config, "quantization_config")
    assert merged.dtype == base.dtype
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_a_stopped_run_exports_its_checkpoint(training_run: MakeRun, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = training_run(tuning="full")
    run.request("stop")
    assert attempt(run) == 0
    path = export_run(run, "merged", tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(path)
    assert not {"optimizer.safetensors", "manifest.json", "rank0.safetensors"} & {p.name for p in path.iterdir()}


def test_what_can_not_be_exported_is_said(training_run: MakeRun, tmp_path: Path) -> None:
    run = training_run(tuning="full", steps=1)
    with pytest.raises(RunError, match="has not written a model yet"):
        export_run(run, "merged", tmp_path / "early")
    assert attempt(run) == 0
    with pytest.raises(RunError, match="has no adapter"):
        export_run(run, "adapter", tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(RunError, match="not empty"):
        export_run(run, "merged", tmp_path / "full")
    with pytest.raises(RunError, match="adapter, merged, gguf"):
        export_run(run, "onnx", tmp_path / "gguf")  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name in {"early", "adapter", "gguf"}) == []


def _write_on_a_full_disk(target: Path) -> None:
    with output.written_whole(target) as partial:
        (partial / "new").touch()
        raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "output"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(TrainingError, match="no space"):
        _write_on_a_full_disk(target)
    assert [p.name for p in tmp_path.rglob("*")] == ["output", "old"]
    with output.written_whole(target) as partial:
        (partial / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["output", "new"]
