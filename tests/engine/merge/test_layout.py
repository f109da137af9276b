"""What a merge will make is known, or refused, before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetui.engine.merge.layout import Layout, lay_out
from finetui.engine.merge.recipe import MergeRecipe
from finetui.engine.merge.sources import find
from finetui.planner.errors import FinetuiError, ModelError, RecipeError

from .conftest import WIDTH, shapes, tensors, tokenizer

Write = Callable[..., Path]


def laid_out(*models: Path, slices: Any = None, **tree: Any) -> Layout:
    tree = {"method": "linear", **tree}
    tree = {"models": [{"model": str(one)} for one in models], **tree} if not slices else tree | {"slices": slices}
    recipe = MergeRecipe.build(tree, source="test")
    return lay_out(recipe, [find(name) for name in recipe.names])


def test_every_tensor_with_its_values_by_depth(write_model: Write) -> None:
    a, b = write_model("a", 1), write_model("b", 2, dtype=torch.bfloat16)
    gradient = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}]
    made = laid_out(a, b, method="slerp", t=gradient)
    assert [piece.name for piece in made.pieces] == sorted(shapes(), key=[p.name for p in made.pieces].index)
    assert {piece.name: piece.shape for piece in made.pieces} == shapes()
    t = {piece.name: piece.whole["t"] for piece in made.pieces}
    assert [t[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(3)] == [0.0, 0.5, 1.0]
    assert t["model.layers.2.input_layernorm.weight"] == t["lm_head.weight"] == 0.5
    assert {piece.dtype for piece in made.pieces} == {"F32"}
    assert {piece.dtype for piece in laid_out(b, a).pieces} == {"BF16"}
    wanted = laid_out(a, b, dtype="float16")
    assert {piece.dtype for piece in wanted.pieces} == {"F16"}
    assert wanted.config["dtype"] == "float16"


def test_shapes_and_names_that_differ_are_named_with_their_models(write_model: Write) -> None:
    a, bare = write_model("a", 1), write_model("bare", stored={"model.embed_tokens.weight": torch.ones(24, WIDTH)})
    with pytest.raises(ModelError, match=r"bare: it has no \S+, and \S*a has"):
        laid_out(bare, a)
    shorter = dict(tensors(2))
    shorter["model.norm.weight"] = torch.ones(WIDTH - 1)
    other = write_model("other", stored=shorter)
    with pytest.raises(ModelError, match=rf"model\.norm\.weight is \[{WIDTH}\] in {a} and \[{WIDTH - 1}\] in {other}"):
        laid_out(a, other)


def test_a_head_of_its_own_where_one_model_has_one(write_model: Write) -> None:
    tied, own = write_model("tied", 1, tied=True), write_model("own", 2)
    made = laid_out(tied, own)
    head = next(piece for piece in made.pieces if piece.name == "lm_head.weight")
    assert [part.tensor for part in head.parts] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert made.config["tie_word_embeddings"] is False
    assert "head" in made.notes[0]
    both = laid_out(tied, write_model("stored", 3, config={"tie_word_embeddings": True}))
    assert "lm_head.weight" not in {piece.name for piece in both.pieces}
    assert both.config["tie_word_embeddings"] is True


def test_vocabularies_that_differ_need_a_word_from_the_user(write_model: Write) -> None:
    words = [chr(97 + n) for n in range(24)]
    a = write_model("a", 1, words_file=tokenizer(words))
    b = write_model("b", 2, words=26)
    with pytest.raises(ModelError, match=r"\[24, 16\].*\[26, 16\].*--tokenizer base"):
        laid_out(a, b)
    moved = write_model("moved", 3, words_file=tokenizer(words[::-1]))
    with pytest.raises(ModelError, match="number their words differently"):
        laid_out(a, moved)
    more = write_model("more", 4, words=26, words_file=tokenizer(words, ["<x>", "<y>"]))
    for keep, count in (("base", 24), ("union", 26)):
        made = laid_out(a, more, tokenizer=keep)
        assert {piece.shape[0] for piece in made.pieces if piece.by_word} == {count}
        assert made.config["vocab_size"] == count


def test_slices_are_counted_anew(write_model: Write) -> None:
    a, b = write_model("a", 1, config={"layer_types": ["x", "y", "z"]}), write_model("b", 2, layers=4)
    slices = [{"sources": [{"model": str(a), "layers": [0, 2]}]}, {"sources": [{"model": str(b), "layers": [1, 4]}]}]
    made = laid_out(method="passthrough", slices=slices)
    parts = {piece.name: piece.parts[0] for piece in made.pieces}
    assert len(parts) == len(shapes(5))
    read = [parts[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(5)]
    assert [(part.source, part.tensor.split(".")[2]) for part in read] == [
        (0, "0"), (0, "1"), (1, "1"), (1, "2"), (1, "3"),
    ]  # fmt: skip
    assert parts["model.embed_tokens.weight"].source == 0
    assert parts["lm_head.weight"].source == parts["model.norm.weight"].source == 1
    assert made.config["num_hidden_layers"] == 5
    slices[1]["sources"][0]["layers"] = [1, 5]
    with pytest.raises(RecipeError, match=r"layers \[1, 5\] are asked for, and \S+b has 4"):
        laid_out(method="passthrough", slices=slices)


def test_values_that_lead_nowhere(write_model: Write) -> None:
    a, b, base = write_model("a", 1), write_model("b", 2), write_model("base")
    with pytest.raises(RecipeError, match="add up to 0"):
        laid_out(a, b, weight=0.0)
    mostly = [{"model": str(a), "weight": 1.0}, {"model": str(b), "weight": -0.999}]
    with pytest.raises(RecipeError, match=r"add up to 0\.001, and can't be divided by that"):
        laid_out(models=mostly)
    laid_out(models=mostly, normalize=False)
    with pytest.raises(RecipeError, match=r"one is nothing beside the others \(1\)"):
        laid_out(models=[{"model": str(a), "weight": 1e9}, {"model": str(b), "weight": 1.0}])
    with pytest.raises(RecipeError, match="density has no value for"):
        laid_out(a, b, method="ties", base=str(base), density=[{"filter": "mlp", "value": 0.5}])
    with pytest.raises(RecipeError, match="goes beyond 0 and 1"):
        laid_out(a, b, method="della", base=str(base), density=0.9, epsilon=0.2)


def test_a_config_with_other_words_than_there_are_rows(write_model: Write) -> None:
    a, b = write_model("a", 1), write_model("b", 2, config={"vocab_size": 99})
    with pytest.raises(
        ModelError, match=r"embed_tokens\.weight has \d+ rows, and config\.json says 99 words"
    ) as caught:
        laid_out(a, b)
    assert caught.value.where == str(b)


def test_packed_weights_and_configs_that_differ(write_model: Write, tmp_path: Path) -> None:
    a = write_model("a", 1, config={"rope_theta": 1e4, "pretraining_tp": 1})
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    notes = laid_out(a, write_model("b", 2, config=newer)).notes
    assert len(notes) == 1
    assert "rope_theta is 10000.0 in" in notes[0]
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert "copy that of" in laid_out(a, tmp_path / "b").notes[-1]
    (a / "chat_template.jinja").write_text("{{ messages }}")
    assert len(laid_out(a, tmp_path / "b").notes) == 1
    packed = write_model("packed", 3, config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ModelError, match="packed \\(gptq\\)"):
        laid_out(a, packed)
    numbers = dict(tensors(2)) | {"steps": torch.tensor([1])}
    made = laid_out(write_model("n", stored=numbers), write_model("m", stored=numbers))
    assert [piece.name for piece in made.pieces if piece.copied] == ["steps"]
    with pytest.raises(FinetuiError, match="steps"):
        laid_out(a, write_model("o", stored=numbers))
    whole = write_model("whole", stored={name: tensor.int() for name, tensor in dict(tensors(2)).items()})
    with pytest.raises(ModelError, match="is stored as I32, and such can't be added up") as caught:
        laid_out(a, whole)
    assert caught.value.where == str(whole)
