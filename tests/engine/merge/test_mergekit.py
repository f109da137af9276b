"""mergekit's files mean here what they mean there; what can't be done is refused, never left out silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetui.engine.merge.recipe import MergeRecipe
from finetui.planner.errors import RecipeError


def load(folder: Path, tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    (folder / "kit.yml").write_text(yaml.safe_dump(tree))
    recipe, notes = MergeRecipe.load(folder / "kit.yml")
    return recipe.to_dict(), notes


def test_ties_with_gradient_filter_and_the_base_among_the_models(tmp_path: Path) -> None:
    got, notes = load(tmp_path, {
        "models": [
            {"model": "o/base"},
            {"model": "o/a", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
            {"model": "o/b", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 0}]}},
        ],
        "merge_method": "ties", "base_model": "o/base", "dtype": "float32", "out_dtype": "bfloat16",
        "parameters": {"normalize": True, "int8_mask": True, "lambda": 0.9},
    })  # fmt: skip
    assert got == {
        "method": "ties", "base": "o/base", "density": 1.0, "normalize": True, "scale": 0.9, "dtype": "bfloat16",
        "models": [
            {"model": "o/a", "density": [1, 0.7, 0.1], "weight": 1.0},
            {"model": "o/b", "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]},
        ],
    }  # fmt: skip
    assert [note for note in notes if "int8_mask" in note] == notes
    assert notes


def test_slerp_begins_at_the_base(tmp_path: Path) -> None:
    two = [{"model": "o/b", "layer_range": [0, 4]}, {"model": "o/a", "layer_range": [0, 4]}]
    got, _ = load(tmp_path, {
        "slices": [{"sources": two}], "merge_method": "slerp", "base_model": "o/a",
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]},
    })  # fmt: skip
    assert [one["model"] for one in got["slices"][0]["sources"]] == ["o/a", "o/b"]
    assert got["slices"][0]["sources"][0]["layers"] == [0, 4]
    assert got["t"][0] == {"filter": "self_attn", "value": [0, 0.5, 1]}
    assert "base" not in got


def test_frankenmerge_with_scale_and_the_angles_of_nuslerp_and_model_stock(tmp_path: Path) -> None:
    part = {"model": "o/a", "layer_range": [0, 4], "parameters": {"scale": 0.5}}
    got, _ = load(tmp_path, {"slices": [{"sources": [part]}], "merge_method": "passthrough"})
    assert got["slices"] == [{"sources": [{"model": "o/a", "weight": 0.5, "layers": [0, 4]}]}]
    models = [{"model": "o/a", "parameters": {"weight": 1}}, {"model": "o/b", "parameters": {"weight": 2}}]
    for row_wise, per in ((False, "row"), (True, "column")):
        angles = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
        got, _ = load(tmp_path, {"models": models, "merge_method": "nuslerp", "parameters": angles})
        assert got["per"] == per
    bare = [{"model": "o/a"}, {"model": "o/b"}]
    tree = {"models": bare, "merge_method": "model_stock", "base_model": "o", "parameters": {"filter_wise": True}}
    assert load(tmp_path, tree)[0]["per"] == "row"


def test_tokenizers(tmp_path: Path) -> None:
    tree = {"models": [{"model": "o/a"}, {"model": "o/b"}], "merge_method": "linear"}
    assert load(tmp_path, {**tree, "tokenizer_source": "union"})[0]["tokenizer"] == "union"
    assert load(tmp_path, {**tree, "tokenizer": {"source": "base"}})[0]["tokenizer"] == "base"
    assert load(tmp_path, {**tree, "tokenizer_source": "o/a"})[0]["tokenizer"] == "base"
    assert "chat_template" in load(tmp_path, {**tree, "chat_template": "auto"})[1][0]


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ({"merge_method": "karcher"}, "'karcher' is not known"),
        ({"merge_method": "linear", "parameters": {"eps": 1}}, "parameter 'eps'"),
        ({"merge_method": "linear", "input_model_parameters": {}}, "no key of mergekit"),
        ({"merge_method": "linear", "models": [{"model": {"path": "x"}}]}, "named by text"),
        ({"merge_method": "linear", "models": [{"modell": "x"}]}, "no model of a merge"),
        ({"merge_method": "linear", "models": {"a": 1}}, "list of mappings"),
        ({"merge_method": "linear", "base_model": "o"}, "none of the models"),
        ({"merge_method": "linear", "tokenizer": {"source": "base", "tokens": {}}}, "tokenizer.tokens"),
        ({"merge_method": "linear", "tokenizer_source": "o/b"}, "tokenizer from 'o/b'"),
        ({"merge_method": "linear", "parameters": {"weight": [{"pattern": "mlp", "value": 1}]}}, "no condition"),
        ({"merge_method": "linear", "parameters": [1]}, "mapping of names"),
    ],
)
def test_what_is_refused(tmp_path: Path, tree: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        load(tmp_path, {"models": [{"model": "o/a"}, {"model": "o/b"}], **tree})
