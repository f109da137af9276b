"""From a run to a GGUF file: checked before anything is merged, written whole or not at all."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
import gguf
import numpy as np
import torch

from finetui.engine.export import export, gguf_model, merged
from finetui.engine.export import gguf as export_gguf
from finetui.engine.run import Run
from finetui.engine.worker import attempt
from finetui.planner.errors import MissingExtraError, ModelError, RunError, TrainingError

MakeRun = Callable[..., Run]
IDS = list(range(5, 45))


@pytest.fixture
def run(training_run: MakeRun) -> Run:
    """A LoRA run that has learned something."""
    run = training_run(steps=2)
    assert attempt(run) == 0
    return run


def logits(folder: Path, **options: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([IDS])).logits
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "merged by PEFT"])
def test_the_file_computes_what_the_merged_model_does(
    whole: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole:
        monkeypatch.setattr(merged, "streamed", lambda *_: None)
        monkeypatch.setattr(export_gguf, "streamed", lambda *_: None)
    made = export(run, "gguf", tmp_path / "g")
    assert [path.name for path in made.path.iterdir()] == [f"{run.name}-f32.gguf"]
    assert made.use == (f"llama-server -m {made.path / f'{run.name}-f32.gguf'}",)
    assert [line.partition(":")[0] for line in made.checked[:2]] == ["chat template", "end of answers"]
    standing = export(run, "merged", tmp_path / "m").path
    assert torch.equal(logits(made.path, gguf_file=f"{run.name}-f32.gguf"), logits(standing))


def test_llama_cpp_answers_as_the_merged_model_does(run: Run, tmp_path: Path, llama_cpp: Any) -> None:
    from transformers import AutoTokenizer

    file = next(export(run, "ollama", tmp_path / "g", quant="f16", system="Hi.").path.glob("*.gguf"))
    standing = export(run, "merged", tmp_path / "m").path
    loaded = llama_cpp(file)
    found, wanted = loaded.logits(IDS), logits(standing)[0, -1].numpy()
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    tokenizer = AutoTokenizer.from_pretrained(standing)
    messages = [{"role": "user", "content": "what is  colour 7?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert loaded.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert loaded.ends() >= set(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))


def test_a_modelfile_lies_beside_it(run: Run, tmp_path: Path) -> None:
    made = export(run, "ollama", tmp_path / "an o", quant="q8_0", system="Be brief.")
    text = (made.path / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith(f'FROM ./{run.name}-q8_0.gguf\nTEMPLATE """{{{{ if .System }}}}<|im_start|>system\n')
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert text.endswith('SYSTEM """Be brief."""\n')
    told = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(made.path / f"{run.name}-q8_0.gguf").tensors
    }
    assert told["blk.0.ffn_down.weight"] == "Q8_0"
    assert shlex.split(made.use[0]) == ["ollama", "create", run.name, "-f", str(made.path / "Modelfile")]


def test_what_can_not_be_written_is_said_before_anything_is_merged(
    run: Run, training_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        pytest.fail("it was merged")

    monkeypatch.setattr(merged, "merge", never)
    monkeypatch.setattr(export_gguf, "write", never)
    with pytest.raises(RunError, match="'q3' is no format"):
        export(run, "gguf", tmp_path / "g", quant="q3")
    with pytest.raises(RunError, match="keeps the format"):
        export(run, "merged", tmp_path / "g", quant="f16")
    with pytest.raises(RunError, match="no place for a system message"):
        export(run, "gguf", tmp_path / "g", system="Hi.")
    with pytest.raises(RunError, match="not written a model yet"):
        export(training_run(steps=1), "gguf", tmp_path / "g")
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: room)
        with pytest.raises(TrainingError, match="the export takes") as caught:
            export(run, "gguf", tmp_path / "g")
    assert caught.value.cause == "disk"
    find = importlib.util.find_spec
    with monkeypatch.context() as patched:
        patched.setattr(export_gguf, "find_spec", lambda name: None if name == "gguf" else find(name))
        with pytest.raises(MissingExtraError, match=r"pip install 'finetui\[export\]'"):
            export(run, "gguf", tmp_path / "g")
    with monkeypatch.context() as patched:
        patched.setattr(gguf_model, "FAMILIES", {})
        with pytest.raises(ModelError, match="architecture llama"):
            export(run, "gguf", tmp_path / "g")
    assert not (tmp_path / "g").exists()
    assert not list(tmp_path.glob(".partial*"))


def test_a_run_that_learned_no_weights_is_refused(training_run: MakeRun, tmp_path: Path) -> None:
    run = training_run(tuning="prompt", steps=1)
    (run.output_path).mkdir()
    (run.output_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RunError, match="virtual tokens"):
        export(run, "gguf", tmp_path / "g")
