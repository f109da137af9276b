"""Trees of tensors come back from disk as they were, and the file is one that safetensors reads."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from finetui.engine.trainers import state  # noqa: E402
from finetui.engine.trainers.state import Snapshot, as_parts, random_state, set_random_state  # noqa: E402
from finetui.engine.trainers.tree import opened_tree, read_tree, write_tensors, write_tree  # noqa: E402


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "moment": torch.randn(5, 3)}, 1: {"none": None}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "on": True, "name": "a", "params": [0, 1]}],
        ("a", 1): [math.inf, -0.0, 2**70],
    }
    write_tree(tmp_path / "tree", tree)
    found = read_tree(tmp_path / "tree")
    assert torch.equal(found["state"][0].pop("moment"), tree["state"][0].pop("moment"))
    assert found["state"][0].pop("step") == tree["state"][0].pop("step")
    assert found == tree
    assert type(found["groups"][0]["betas"]) is tuple
    assert math.copysign(1, found["a", 1][1]) == -1


def test_a_large_tree_lies_in_several_files_and_is_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SHARD", 100)
    tree = {"states": [{"m": torch.full((4, 5), float(number))} for number in range(4)], "lr": 0.1}
    parts = as_parts("optimizer.safetensors", tree)
    assert list(parts) == ["optimizer.safetensors", *(f"optimizer.{number}.safetensors" for number in (2, 3, 4))]
    hashes = Snapshot({"note": b"n"}, parts).write(tmp_path)
    assert {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in [*parts, "note"]} == hashes
    found = read_tree(tmp_path / "optimizer.safetensors")
    assert found["lr"] == 0.1
    assert [float(each["m"].mean()) for each in found["states"]] == [0, 1, 2, 3]
    with opened_tree(tmp_path / "optimizer.safetensors") as told:
        assert told["states"][3]["m"].rows(slice(1, 3)).shape == (2, 5)
    assert list(as_parts("optimizer.safetensors", {"lr": 0.1})) == ["optimizer.safetensors"]


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "int8", "uint8", "bool"]
)
def test_every_dtype_and_odd_shapes_are_as_safetensors_reads_them(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    tensors = {
        "scalar": torch.ones(()).to(kind),
        "empty": torch.zeros(0, 4).to(kind),
        "odd": torch.arange(7).to(kind),
        "turned": torch.arange(6).reshape(2, 3).to(kind).T,
        "wide": torch.arange(3.0, dtype=torch.float64),
    }
    digest = write_tensors(tmp_path / "file", tensors, {"format": "pt"})
    found = load_file(tmp_path / "file")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_what_could_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="function"):
        write_tree(tmp_path / "tree", {"hook": lambda: None})
    assert not (tmp_path / "tree").exists()


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    device = torch.device("cpu")
    draw()
    write_tree(tmp_path / "rank", random_state(device))
    expected = draw()
    draw()
    set_random_state(read_tree(tmp_path / "rank"), device)
    assert draw() == expected
