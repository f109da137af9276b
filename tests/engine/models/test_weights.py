"""Weights read by threads are those that safetensors reads, and a damaged file is an error, never silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file

from finetui.engine.models import weights
from finetui.engine.models.weights import Reading, around, stored_tensors

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files with tensors of several dtypes, odd sizes among them; pieces are smaller than most tensors."""
    monkeypatch.setattr(weights, "BUFFER", 1000)
    torch.manual_seed(0)
    first = {"a": torch.randn(37, 53).bfloat16(), "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    second = {"b": torch.randn(129, 7), "c": torch.randn(3, 5, 7).half()}
    save_file(first, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "two.safetensors")
    places = dict.fromkeys(first, "one.safetensors") | dict.fromkeys(second, "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def expected(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "one.safetensors") | load_file(folder / "two.safetensors")


@pytest.mark.parametrize("threads", [1, 4])
def test_every_bit_arrives(folder: Path, threads: int) -> None:
    found = Reading(stored_tensors(folder), CPU, threads=threads).tensors()
    told = expected(folder)
    assert found.keys() == told.keys()
    for name, tensor in told.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


@pytest.mark.cuda
def test_every_bit_arrives_on_a_gpu(folder: Path) -> None:
    device = torch.device("cuda", 0)
    found = Reading(stored_tensors(folder), device).tensors()
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in expected(folder).items())
    assert all(tensor.device == device for tensor in found.values())


def test_a_file_cut_short_is_told(folder: Path) -> None:
    file = folder / "two.safetensors"
    whole = stored_tensors(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"two\.safetensors is damaged"):
        stored_tensors(folder)
    with pytest.raises(OSError, match="ends too early"):
        Reading(whole, CPU).tensors()


def test_formats_that_are_not_plain_floats_are_left_alone(tmp_path: Path) -> None:
    save_file({"packed": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    assert stored_tensors(tmp_path) == {}
    assert stored_tensors(tmp_path / "nothing") == {}


@pytest.mark.parametrize("family", ["llama", "gemma"])  # the second with tied embeddings
def test_a_model_around_read_weights_is_the_one_that_transformers_loads(
    model_folder: Callable[[str], Path], family: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_folder(family)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    tensors = Reading(stored_tensors(folder), CPU).tensors()
    places = {tensor.data_ptr() for tensor in tensors.values()}
    built = around(tensors, folder, options)
    assert built is not None
    model, info = built
    stock = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    assert not info["missing_keys"]
    assert {p.data_ptr() for p in model.parameters()} <= places, "nothing was copied"
    ours, theirs = model.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    buffers = zip(model.buffers(), stock.buffers(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in buffers)
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert (model.name_or_path, model.training) == (stock.name_or_path, stock.training)
    assert _tied(model) == _tied(stock)


def _tied(model: Any) -> bool:
    return bool(model.get_input_embeddings().weight is model.get_output_embeddings().weight)
