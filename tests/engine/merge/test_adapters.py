"""Adapters added to one adapter give what PEFT's ``add_weighted_adapter`` gives, and PEFT loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetui.engine.merge.adapted import Adapter
from finetui.engine.merge.adapters import merge_adapters, nearest, ranks_of
from finetui.engine.merge.recipe import MergeRecipe
from finetui.planner.errors import ModelError

from .test_adapted import adapter


def recipe_of(method: str, folders: list[Path], weights: list[float], **tree: Any) -> MergeRecipe:
    models = [{"model": str(folder), "weight": weight} for folder, weight in zip(folders, weights, strict=True)]
    return MergeRecipe.build({"method": method, "models": models, **tree}, source="test")


@pytest.fixture
def two(model_folder: Callable[[str], Path], tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base, and two adapters of other modules and scalings."""
    base = model_folder("llama")
    one = adapter(base, tmp_path / "one", 1)
    return base, [one, adapter(base, tmp_path / "two", 2, target_modules=["q_proj", "v_proj"], lora_alpha=16)]


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_the_sum_is_that_of_peft(two: tuple[Path, list[Path]], tmp_path: Path, method: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, folders = two
    weights = [0.7, 0.4]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], adapter_name="one")
    model.load_adapter(folders[1], "two")
    model.add_weighted_adapter(["one", "two"], weights, "sum", combination_type=method)
    model.set_adapter("sum")
    made = merge_adapters(
        recipe_of(method, folders, weights, **({"to": "adapter"} if method == "linear" else {})), tmp_path / "out"
    )
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made.path)
    words = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(words).logits, model(words).logits, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert float((ours(words).logits - model(words).logits).abs().max()) > 0.01
    assert {module.rpartition(".")[2] for module in Adapter("x", made.path).pairs} == {"q_proj", "down_proj", "v_proj"}
    again = merge_adapters(MergeRecipe.load(made.path / "merge.yaml")[0], tmp_path / "again")
    assert again.same is True


def test_ranks_are_known_before(two: tuple[Path, list[Path]]) -> None:
    base, folders = two
    where, ranks = ranks_of(recipe_of("cat", folders, [1.0, 1.0]))
    assert where == str(base)
    assert {module.rpartition(".")[2]: rank for module, rank in ranks.items()} == {
        "q_proj": 8, "down_proj": 4, "v_proj": 4,
    }  # fmt: skip
    assert set(ranks_of(recipe_of("svd", folders, [1.0, 1.0], rank=3))[1].values()) == {3}


def test_an_adapter_added_to_its_negative_is_nothing(two: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _, (one, _) = two
    copy = tmp_path / "copy"
    one.rename(copy)
    made = merge_adapters(recipe_of("cat", [copy, copy], [1.0, -1.0]), tmp_path / "out")
    found = Adapter("out", made.path)
    assert max(float(found.product(module).abs().max()) for module in found.pairs) < 1e-6


def test_nearest_is_the_truncated_svd() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 30, generator=draw), torch.randn(20, 7, generator=draw)
    u, s, v = torch.linalg.svd((b @ a).double())
    found = nearest(a, b, 3)
    torch.testing.assert_close((found.b @ found.a).double(), (u[:, :3] * s[:3]) @ v[:3], rtol=1e-5, atol=1e-5)
    assert found.kept == pytest.approx(float(s[:3].square().sum() / s.square().sum()))
    whole = nearest(a, b, 50)
    torch.testing.assert_close(whole.b @ whole.a, b @ a, rtol=1e-5, atol=1e-4)
    assert whole.kept == pytest.approx(1.0)


def test_what_cannot_be_added(
    model_folder: Callable[[str], Path], two: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, (one, other) = two
    dora = adapter(base, tmp_path / "dora", 3, use_dora=True)
    saved = adapter(base, tmp_path / "saved", 3, modules_to_save=["lm_head"])
    small = adapter(base, tmp_path / "small", 3, r=2)
    elsewhere = adapter(model_folder("qwen3"), tmp_path / "elsewhere", 3)
    for method, second, what in (
        ("cat", dora, "DoRA"), ("cat", saved, "lm_head.weight whole"), ("cat", elsewhere, "its base is"),
        ("cat", base, "no adapter"), ("linear", small, "pairs of one rank"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=what):
            merge_adapters(recipe_of(method, [one, second], [1.0, 1.0], to="adapter"), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert other.is_dir()
