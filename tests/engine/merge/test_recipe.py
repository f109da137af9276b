"""Merges as files: what is asked for is possible, or is refused with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetui.engine.merge.recipe import MergeRecipe
from finetui.planner.errors import RecipeError

AB: list[dict[str, Any]] = [{"model": "a"}, {"model": "b"}]


def build(**tree: Any) -> MergeRecipe:
    return MergeRecipe.build({"models": AB, **tree}, source="merge.yaml")


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tree = {
        "method": "ties", "base": "org/base", "density": 0.5, "dtype": "bfloat16",
        "models": [{"model": "a", "weight": [0.0, 1.0]},
                   {"model": "org/b", "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]}],
    }  # fmt: skip
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(tree))
    recipe, notes = MergeRecipe.load(tmp_path / "merge.yaml")
    assert recipe.names == ["org/base", str(tmp_path / "a"), "org/b"]
    assert notes == []
    assert MergeRecipe.build(recipe.to_dict(), source="again") == recipe
    assert next(iter(recipe.to_dict()["models"][0])) == "model"


@pytest.mark.parametrize(
    ("tree", "what", "do"),
    [
        ({"method": "tise"}, "method", "Did you mean 'ties'"),
        ({"method": "ties", "density": 0.5}, "needs a base", "base"),
        ({"method": "ties", "base": "o"}, "needs the density of a", "density"),
        ({"method": "ties", "base": "o", "density": 1.5}, "at most 1", ""),
        ({"method": "ties", "base": "a", "density": 0.5}, "base is one of the models", "once"),
        ({"method": "linear", "base": "o"}, "base has no effect on linear", "Remove"),
        ({"method": "linear", "density": 0.5}, "density has no effect on linear", "normalize, weight"),
        ({"method": "linear", "seed": 3}, "seed has no effect", ""),
        ({"method": "linear", "rank": 3}, "rank has no effect", ""),
        ({"method": "linear", "weight": float("nan")}, "weight: nan is no number", "Write 0.5"),
        ({"method": "linear", "weight": [{"filter": "mlp"}]}, "no list of conditions", ""),
        ({"method": "slerp", "models": [*AB, {"model": "c"}]}, "exactly 2 models", ""),
        ({"method": "slerp", "models": [{"model": "a", "weight": 1}, AB[1]]}, "weight has no effect on slerp", "t"),
        ({"method": "model_stock", "base": "o", "per": "column"}, "tensor or row", ""),
        ({"method": "nearswap", "base": "o", "models": AB[:1]}, "needs t", ""),
        ({"method": "cat", "to": "model"}, "makes an adapter", "linear"),
        ({"method": "slerp", "t": 9}, "from 0, the first model, to 1", ""),
        ({"method": "slerp", "t": [0, -0.1]}, "from 0, the first model, to 1", ""),
        ({"method": "slerp", "t": float("nan")}, "t: nan is no number", "Write 0.5"),
        ({"method": "slerp", "t": [{"filter": "mlp", "value": 2}, {"value": 0}]}, "from 0, the first model", ""),
        ({"method": "nearswap", "base": "o", "models": AB[:1], "t": 0}, "above 0", "t: 0.0001"),
        ({"method": "nuslerp", "weight": -1}, "nuslerp goes from one model to the other", "0 or more"),
        ({"method": "task_arithmetic", "base": "o", "weight": 1e9}, "a weight of 1e+09", "-100 to 100"),
        ({"method": "linear", "weight": 1e30}, "weight is 1e+30, larger than any", "smaller"),
        ({"method": "task_arithmetic", "base": "o", "models": [{"model": "a", "weight": -101}]}, "of -101", "100"),
        ({"method": "task_arithmetic", "base": "o", "scale": 1e9}, "a scale of 1e+09", "100"),
        ({"method": "task_arithmetic", "base": "o", "scale": float("inf")}, "scale: inf is no number", ""),
        ({"method": "linear", "normalize": False, "weight": 1e4}, "a weight of 10000", "100"),
        ({"method": "cat", "weight": 1e4}, "a weight of 10000", "100"),
        ({"method": "ties", "base": "o", "density": -0.5}, "above 0 and at most 1", ""),
        ({"method": "ties", "base": "o", "density": float("nan")}, "density: nan is no number", ""),
        ({"method": "ties", "to": "adapter", "base": "o", "density": 1}, "makes no adapter", "cat, svd"),
        ({"method": "cat", "weight": [0, 1]}, "one number", ""),
        ({"method": "linear", "sclices": []}, "unknown key 'sclices'", "slices"),
        ({"method": "linear", "models": []}, "models or slices", ""),
        ({"method": "passthrough", "models": [], "slices": [{"sources": [{"model": "a", "layers": [3, 3]}]}]},
         "number of layers", ""),
        ({"method": "linear", "models": [], "slices": [{"sources": [
            {"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [0, 3]}]}]}, "number of layers", "one length"),
        ({"method": "task_arithmetic", "base": "o", "models": [], "slices": [{"sources": [
            {"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [1, 3]}]}]}, "the same layers", ""),
    ],
)  # fmt: skip
def test_what_is_not_possible(tree: dict[str, Any], what: str, do: str) -> None:
    with pytest.raises(RecipeError) as error:
        build(**tree)
    assert what in error.value.message
    assert do in error.value.message


@pytest.mark.parametrize(
    "tree",
    [
        {"method": "slerp", "t": [0, 1]},
        {"method": "nearswap", "base": "o", "models": AB[:1], "t": 9},
        {"method": "linear", "weight": 1e6},  # counts beside the other's alone
        {"method": "nuslerp", "weight": 1e6},
        {"method": "ties", "base": "o", "density": 1, "weight": 1e6},
        {"method": "task_arithmetic", "base": "o", "weight": -1, "scale": 2.5},
    ],
)
def test_what_is_unusual_and_possible(tree: dict[str, Any]) -> None:
    assert build(**tree).method == tree["method"]


def test_hyphens_are_underscores() -> None:
    assert build(method="dare-ties", base="o", density=0.5, seed=4).method == "dare_ties"


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="mapping"):
        MergeRecipe.load(tmp_path / "x.yaml")
    (tmp_path / "y.yaml").write_text("method: linear\nmodels:\n  - model: a\n    wieght: 1\n  - model: b\n")
    with pytest.raises(RecipeError, match=r"y\.yaml:4.*wieght"):
        MergeRecipe.load(tmp_path / "y.yaml")
