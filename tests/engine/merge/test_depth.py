"""Which tensors are layers, and the config of a model with other layers."""

from __future__ import annotations

from typing import Any

import pytest

from finetui.engine.merge import depth
from finetui.planner.errors import ModelError


def test_layers_are_the_row_of_modules_that_the_config_counts() -> None:
    names = ["wte.weight", *(f"h.{n}.mlp.experts.{e}.w" for n in range(3) for e in range(8)), "ln_f.weight"]
    stack = depth.layers_of(names, {"n_layer": 3})
    assert stack == depth.Stack("h.", 3)
    assert depth.number_of("h.2.mlp.experts.7.w", stack) == 2
    assert depth.number_of("wte.weight", stack) is None
    assert stack.endings(names, 1)[0] == "mlp.experts.0.w"
    assert depth.layers_of(names, {"n_layer": 4}) is None
    assert depth.layers_of(names, {}) is None


def test_layers_of_the_eyes_are_not_meant() -> None:
    names = [f"{part}.{n}.w" for part in ("vision_tower.layers", "language_model.model.layers") for n in range(2)]
    stack = depth.layers_of(names, {"vision_config": {}, "text_config": {"num_hidden_layers": 2}})
    assert stack == depth.Stack("language_model.model.layers.", 2)
    assert depth.layers_of([f"{part}.{n}.w" for part in ("a", "b") for n in range(2)], {"num_layers": 2}) is None


def test_positions() -> None:
    stack = depth.Stack("model.layers.", 5)
    assert [depth.position(f"model.layers.{n}.w", stack) for n in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert depth.position("lm_head.weight", stack) == 0.0
    assert depth.comes_before("model.embed_tokens.weight")
    assert not depth.comes_before("embed_out.weight")


def test_lists_of_layers_are_put_together() -> None:
    one: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": ["full", "slide", "full"], "eos_token_id": [1, 2, 3]}
    two = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}
    made = {**one, "first_k_dense_replace": 0}
    depth.stack(made, [(one, 0), (one, 1), (two, 1), (two, 2)], "m")
    assert made["num_hidden_layers"] == 4
    assert made["layer_types"] == ["full", "slide", "b", "c"]
    assert made["eos_token_id"] == [1, 2, 3]  # a list of as many items that is about something else


def test_layers_that_are_told_by_number_cannot_move() -> None:
    config = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
    depth.stack(dict(config), [(config, 0), (config, 1), (config, 2)], "m")
    with pytest.raises(ModelError, match="first_k_dense_replace"):
        depth.stack(dict(config), [(config, 0), (config, 2)], "m")
