"""Checkpoints that are packed already: trained as their plan has them, or refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import torch
from safetensors.torch import load_file, save_file

from finetui.engine.events import read_events
from finetui.engine.export import export_run
from finetui.engine.models.load import load_base
from finetui.engine.run import Run
from finetui.engine.worker import attempt

from ..conftest import RESOLVED

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def original(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def in_nf4(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as bitsandbytes packs it and transformers saves that."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    folder = _beside(original, tmp_path_factory.mktemp("packed") / "nf4")
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def in_fp8(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as DeepSeek V3 is stored: e4m3 with a scale per block of 128 x 128, which a small weight is one of."""
    folder = _beside(original, tmp_path_factory.mktemp("packed") / "fp8")
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(original / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        scale = value.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (value / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _say(folder, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    return folder


def _beside(original: Path, folder: Path) -> Path:
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def _say(folder: Path, quantisation: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))


def losses(run: Run) -> list[float]:
    return [event.data["loss"] for event in read_events(run.events_path) if event.type == "step"]


def test_nf4_of_others_trains_as_our_own(training_run: MakeRun, original: Path, in_nf4: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    runs = [training_run("llama", "qlora", {"model": str(folder)}, steps=3) for folder in (original, in_nf4)]
    for run in runs:
        assert attempt(run) == 0, run.events_path.read_text()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    assert len(losses(runs[1])) == 3
    merged = AutoModelForCausalLM.from_pretrained(export_run(runs[1], "merged", tmp_path / "merged"))
    assert not hasattr(merged.config, "quantization_config")
    ids = torch.arange(5, 45).view(2, 20)
    packed = load_base(in_nf4, runs[1].plan.resolved, torch.device("cpu"), lambda _: None)
    with torch.no_grad():
        found = merged(ids).logits
        untouched = packed(ids).logits
        wanted = PeftModel.from_pretrained(packed, str(runs[1].output_path)).eval()(ids).logits
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
    assert (untouched - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_e4m3_is_opened_and_trained_in_16_bits(
    training_run: MakeRun, original: Path, in_fp8: Path, tmp_path: Path, tuning: str
) -> None:
    from transformers import AutoModelForCausalLM

    rate = 1e-3 if tuning == "full" else 1e-2
    runs = [
        training_run("llama", tuning, {"model": str(folder)}, steps=3, learning_rate=rate)
        for folder in (original, in_fp8)
    ]
    for run in runs:
        assert attempt(run) == 0, run.events_path.read_text()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-2)
    assert losses(runs[1]) != losses(runs[0])
    left = runs[1].output_path if tuning == "full" else export_run(runs[1], "merged", tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(left / "model.safetensors").values()} == {torch.float32}
    assert not hasattr(AutoModelForCausalLM.from_pretrained(left).config, "quantization_config")


def test_mxfp4_is_opened(tmp_path: Path) -> None:
    """gpt-oss: two e2m1 values per byte, and a power of two for each 32 of them (OCP Microscaling, version 1.0)."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
        layer_types=["full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, outside = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outside, inside // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 128, (experts, outside, inside // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        table = torch.cat([steps, -steps])
        values = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
        opened = (values * 2.0 ** (scales.int() - 127).unsqueeze(-1)).flatten(-2)
        wanted[name] = opened.transpose(1, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _say(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    model = load_base(tmp_path, RESOLVED, torch.device("cpu"), lambda _: None)
    assert len(wanted) == 2
    for name, expected in wanted.items():
        assert torch.equal(model.get_parameter(name).float(), expected)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name].float(), expected) for name, expected in wanted.items())


def test_what_a_plan_by_name_did_not_know_is_refused_at_loading(
    training_run: MakeRun, in_fp8: Path, original: Path, tmp_path: Path
) -> None:
    run = training_run("llama", "qlora", {"model": str(in_fp8)}, steps=3)
    assert attempt(run) == 1
    failure = next(event.data for event in read_events(run.events_path) if event.type == "failure")
    assert "stored as FP8, which this plan (nf4) can't be carried out on" in failure["message"]
    folder = _beside(original, tmp_path / "gptq")
    shutil.copy(original / "model.safetensors", folder)
    _say(folder, {"quant_method": "gptq", "bits": 4})
    run = training_run("llama", "lora", {"model": str(folder)}, steps=3)
    assert attempt(run) == 1
    failure = next(event.data for event in read_events(run.events_path) if event.type == "failure")
    assert "stored as GPTQ (4 bits)" in failure["message"]
