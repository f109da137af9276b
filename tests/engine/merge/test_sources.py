"""What a name stands for, and what is refused before anything of it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetui.engine.merge.sources import Checkpoint, Listed, find, find_listed, parts
from finetui.engine.run import Run
from finetui.planner.errors import ModelError, UserError

from .conftest import shapes, tensors

Write = Callable[..., Path]


def test_a_checkpoint_in_one_file_or_in_shards(write_model: Write) -> None:
    one, several = find(str(write_model("one", 1))), find(str(write_model("several", 1, shards=3)))
    assert {name: told.shape for name, told in one.tensors.items()} == shapes()
    assert one.tensors.keys() == several.tensors.keys()
    assert len(several.weight_files()) == 3
    for name, tensor in tensors(1).items():
        assert torch.equal(one.read(name), tensor)
        assert torch.equal(several.read(name), tensor)


def test_what_is_no_checkpoint(write_model: Write, tmp_path: Path) -> None:
    folder = write_model("m", 1, shards=2)
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    outside = {**told["weight_map"], "x": "../../secret.safetensors"}
    index.write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(UserError, match="does not lie in its own folder"):
        find(str(folder))
    index.write_text(json.dumps({"weight_map": {**told["weight_map"], "x": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone\.safetensors is missing"):
        _ = find(str(folder)).tensors
    index.unlink()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="can't be read"):
        _ = find(str(folder)).tensors
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelError, match="pickle"):
        find(str(pickled))


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"w is in a\.safetensors and in b\.safetensors"):
        _ = Checkpoint("m", tmp_path).tensors


def test_runs_stand_for_what_they_made(write_model: Write, make_run: Callable[..., Run]) -> None:
    model = write_model("m", 1)
    run = make_run(name="mine")
    model.rename(run.output_path)
    (run.output_path / "tokenizer_config.json").write_text("{}")
    assert parts("mine") == (str(run.output_path), None)
    assert parts(str(run.path)) == (str(run.output_path), None)
    assert find("mine").tensors.keys() == shapes().keys()
    assert parts("org/model") == ("org/model", None)


def test_a_base_and_its_adapter(tmp_path: Path) -> None:
    adapter = tmp_path / "with+plus"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert parts(str(adapter)) == ("org/base", adapter)
    assert parts(f"org/other+{adapter}".replace("with+plus", "with+plus")) == ("org/other", adapter)
    with pytest.raises(ModelError, match="no adapter 'nothing'"):
        parts("org/base+nothing")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base"):
        parts(str(adapter))


def test_a_model_of_the_hub_is_listed_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from finetui.planner import hub

    header = {"w": SimpleNamespace(dtype="BF16", shape=[2, 3]), "x.rotary_emb.inv_freq": SimpleNamespace()}
    files = {"model.safetensors": SimpleNamespace(tensors=header)}
    asked: list[Any] = []

    def metadata(self: object, model: str) -> SimpleNamespace:
        asked.append(model)
        return SimpleNamespace(files_metadata=files)

    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(hub, "remote_config", lambda model: {"model_type": "llama"})
    source = find_listed("some/model-that-is-not-here")
    assert isinstance(source, Listed)
    assert {name: told.shape for name, told in source.tensors.items()} == {"w": (2, 3)}
    assert source.config == {"model_type": "llama"}
    assert asked == ["some/model-that-is-not-here"]
