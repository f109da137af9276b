"""Merges from folders to a folder: what comes out, what goes along, and that it can be made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from finetui.engine.merge import make, pruning, write
from finetui.engine.merge.make import merge, prepare
from finetui.engine.merge.recipe import MergeRecipe
from finetui.planner.errors import ModelError, TrainingError, UserError

from .conftest import tensors, tokenizer

Write = Callable[..., Path]


def recipe_of(method: str, *models: Path, **tree: Any) -> MergeRecipe:
    return MergeRecipe.build({"method": method, "models": [{"model": str(m)} for m in models], **tree}, source="test")


def carried_out(recipe: MergeRecipe, out: Path) -> dict[str, torch.Tensor]:
    made = merge(prepare(recipe), out)
    return {name: tensor for file in made.files for name, tensor in load_file(out / file).items()}


def test_a_mean_with_all_that_goes_along(write_model: Write, tmp_path: Path) -> None:
    a, b = write_model("a", 1, shards=3), write_model("b", 2)
    (a / "chat_template.jinja").write_text("{{ messages }}")
    (a / "generation_config.json").write_text('{"eos_token_id": 7}')
    (a / "README.md").write_text("of a alone")
    (a / "training.json").write_text("{}")
    (a / "tokenizer_config.json").write_text("{}")
    (a / "LICENSE").write_text("free")
    told: list[tuple[int, int]] = []
    made = merge(prepare(recipe_of("linear", a, b)), tmp_path / "out", lambda done, total: told.append((done, total)))
    got = load_file(made.path / "model.safetensors")
    for name, one in tensors(1).items():
        torch.testing.assert_close(got[name], (one + tensors(2)[name]) / 2)
    names = {path.name for path in made.path.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "merge.yaml", "chat_template.jinja", "generation_config.json", "LICENSE",
        "tokenizer_config.json",
    }  # fmt: skip
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in got.values())
    assert json.loads((made.path / "config.json").read_text())["num_hidden_layers"] == 3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_the_file_makes_the_same_bits_again(write_model: Write, tmp_path: Path, method: str) -> None:
    base, a, b = write_model("base"), write_model("a", 1), write_model("b", 2, dtype=torch.bfloat16)
    recipe = recipe_of(method, a, b, base=str(base), density=0.5, seed=5, dtype="bfloat16")
    first = merge(prepare(recipe), tmp_path / "out")
    again, notes = MergeRecipe.load(first.path / "merge.yaml")
    assert again.made is not None
    assert notes == []
    assert again.made.sources[str(a)].keys() == {"model.safetensors"}
    second = merge(prepare(again), tmp_path / "again")
    assert second.same is True
    assert (first.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()
    other = merge(prepare(again.model_copy(update={"seed": 6})), tmp_path / "other")
    assert other.same is False


def test_a_model_that_changed_since_is_refused(write_model: Write, tmp_path: Path) -> None:
    a, b = write_model("a", 1), write_model("b", 2)
    made = merge(prepare(recipe_of("slerp", a, b)), tmp_path / "out")
    save_file(tensors(3), b / "model.safetensors")
    again, _ = MergeRecipe.load(made.path / "merge.yaml")
    with pytest.raises(ModelError, match=r"b: model\.safetensors is not the file that was merged then"):
        merge(prepare(again), tmp_path / "again")
    assert not (tmp_path / "again").exists()
    tree = yaml.safe_load((made.path / "merge.yaml").read_text())
    del tree["made"]
    assert merge(prepare(MergeRecipe.build(tree, source="x")), tmp_path / "again").same is None


def test_layers_of_two_models_in_one(write_model: Write, tmp_path: Path) -> None:
    a, b = write_model("a", 1), write_model("b", 2)
    slices = [{"sources": [{"model": str(m), "layers": layers}]} for m, layers in ((a, [0, 2]), (b, [1, 3]))]
    recipe = MergeRecipe.build({"method": "passthrough", "slices": slices}, source="test")
    got = carried_out(recipe, tmp_path / "out")
    for number, (seed, layer) in enumerate([(1, 0), (1, 1), (2, 1), (2, 2)]):
        name = "mlp.up_proj.weight"
        assert torch.equal(got[f"model.layers.{number}.{name}"], tensors(seed)[f"model.layers.{layer}.{name}"])
    assert torch.equal(got["model.embed_tokens.weight"], tensors(1)["model.embed_tokens.weight"])
    assert torch.equal(got["lm_head.weight"], tensors(2)["lm_head.weight"])


def test_words_of_both(write_model: Write, tmp_path: Path) -> None:
    words = [chr(97 + n) for n in range(24)]
    a = write_model("a", 1, words_file=tokenizer(words))
    b = write_model("b", 2, words=25, words_file=tokenizer(words, ["<x>"]))
    got = carried_out(recipe_of("linear", a, b, tokenizer="union"), tmp_path / "out")
    rows = got["lm_head.weight"]
    assert rows.shape[0] == 25
    torch.testing.assert_close(rows[24], tensors(2, words=25)["lm_head.weight"][24])
    mean = (tensors(1)["lm_head.weight"][3] + tensors(2, words=25)["lm_head.weight"][3]) / 2
    torch.testing.assert_close(rows[3], mean)
    told = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert told["added_tokens"] == [{"id": 24, "content": "<x>", "special": True}]
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 25


def test_shards_and_pieces_change_no_bit(write_model: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, a, b = write_model("base"), write_model("a", 1), write_model("b", 2)
    recipe = recipe_of("ties", a, b, base=str(base), density=0.3)
    whole = carried_out(recipe, tmp_path / "whole")
    monkeypatch.setattr(pruning, "CHUNK", 64)
    monkeypatch.setattr(make, "shards_of", lambda pieces: write.shards_of(pieces, 3000))
    parts = carried_out(recipe, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    from finetui.engine.merge.sources import find

    assert find(str(tmp_path / "parts")).tensors.keys() == whole.keys()  # through the index


def test_nothing_is_left_where_a_merge_fails(
    write_model: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write_model("a", 1), write_model("b", 2, stored={k: v * 1e5 for k, v in tensors(2).items()})
    with pytest.raises(ModelError, match="not finite in F16"):
        merge(prepare(recipe_of("linear", a, b, dtype="float16")), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        merge(prepare(recipe_of("linear", a, b)), tmp_path / "full")
    no_room = shutil._ntuple_diskusage(10**12, 10**12, 1000)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: no_room)
        with pytest.raises(UserError, match="the result needs"):
            merge(prepare(recipe_of("linear", a, b)), tmp_path / "out")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make, "write_shards", full)
    with pytest.raises(TrainingError, match="no space is left"):
        merge(prepare(recipe_of("linear", a, b)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_counters_are_kept_where_they_agree(write_model: Write, tmp_path: Path) -> None:
    def counted(name: str, seed: int, steps: int) -> Path:
        return write_model(name, stored=tensors(seed) | {"steps": torch.tensor([steps])})

    got = carried_out(recipe_of("linear", counted("a", 1, 3), counted("b", 2, 3)), tmp_path / "out")
    assert got["steps"].tolist() == [3]
    with pytest.raises(ModelError, match="steps holds no floating-point numbers and differs"):
        carried_out(recipe_of("linear", tmp_path / "a", counted("c", 2, 4)), tmp_path / "out2")
