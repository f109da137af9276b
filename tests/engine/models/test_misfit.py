"""A checkpoint that its model's class can't use: one message says why."""

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

from finetui.engine.models.load import load_base, load_tokenizer, locate
from finetui.engine.models.misfit import explained, require_one_format, with_adapter
from finetui.planner.errors import ModelError

from ..conftest import RESOLVED

CPU = torch.device("cpu")


@pytest.fixture
def folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def changed(folder: Path, **keys: Any) -> None:
    """Set keys of the config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def load(folder: Path) -> list[Any]:
    """What is said while a model is loaded."""
    said: list[Any] = []
    load_base(folder, RESOLVED, CPU, said.append)
    return said


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"vocab_size": 500}, r"model\.embed_tokens\.weight is \[320, 64\], and should be \[500, 64\], and 1 more"),
        ({"hidden_size": 128}, r"is \[320, 64\], and should be \[320, 128\]"),
        ({"num_hidden_layers": 3}, "lacks weights of the model: 9 "),
        ({"hidden_size": "64"}, "transformers can't use this config .*hidden_size.*expected int"),
        ({"model_type": "nothing_like_it"}, "transformers can't use this config"),
    ],
)
def test_a_config_of_another_model(
    folder: Path, keys: dict[str, Any], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changed(folder, **keys)
    with pytest.raises(ModelError, match=told) as caught:
        load(folder)
    assert str(folder) in caught.value.where
    assert caught.value.do
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_layers_that_the_config_does_not_count_are_left_out_with_a_word(folder: Path) -> None:
    assert load(folder) == []
    changed(folder, num_hidden_layers=1)
    (fallback,) = load(folder)
    assert fallback.what.startswith("weights left out: 9 (model.layers.1.")


def test_a_file_that_was_cut_after_it_was_looked_at(folder: Path) -> None:
    locate(str(folder))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="this file can't be read") as caught:
        load(folder)
    assert caught.value.where == str(file)
    with pytest.raises(ModelError, match="this file can't be read"):
        locate(str(folder))


def test_a_tokenizer_that_is_none_and_one_whose_config_is_none(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="the tokenizer can't be loaded"):
        load_tokenizer(folder)
    changed(folder, hidden_size="64")
    with pytest.raises(ModelError, match="transformers can't use this config"):
        load_tokenizer(folder)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), MemoryError("none left")])
def test_what_is_wrong_with_the_machine_is_not_put_down_to_the_model(folder: Path, error: Exception) -> None:
    assert explained(error, folder, []) is error


def test_an_adapter_that_is_damaged_or_of_another_model(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder)

    place = tmp_path / "adapter"
    get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(place)
    with_adapter(base(), place, "BASE")
    file = place / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({name: torch.ones(3, *tensor.shape[1:]) for name, tensor in whole.items()}, file)
    with pytest.raises(ModelError, match=r"does not fit its base BASE .*mismatch"):
        with_adapter(base(), place, "BASE")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="this file can't be read"):
        with_adapter(base(), place, "BASE")
    (place / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        with_adapter(base(), place, "BASE")


def test_weights_of_two_formats_are_refused_where_a_model_is_split(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from finetui.engine.models.adapt import decoder_layers

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layers = list(decoder_layers(model))
    require_one_format(model, layers)
    layers[1].input_layernorm.float()
    with pytest.raises(
        ModelError, match=r"q_proj\.weight is bfloat16 and input_layernorm\.weight is float32"
    ) as caught:
        require_one_format(model, layers)
    assert "bf16-mixed" in caught.value.do
    layers[1].input_layernorm.requires_grad_(False)
    require_one_format(model, layers)
    model.lm_head.float()
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is bfloat16 and lm_head\.weight is float32"):
        require_one_format(model, layers)
