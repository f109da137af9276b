"""What layers keep for their backward pass: a plan's word for it, and what transformers is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finetui.engine.events import Fallback
from finetui.engine.models.layers import checkpoint_layers, keeping, ours
from finetui.engine.models.load import patch_kernels, tell_fallbacks
from finetui.kernels.decoder_layer import Keeping
from finetui.kernels.patch import patch_model, unpatch

from ..conftest import RESOLVED


def resolved(checkpointing: str, kept: int = 0) -> Any:
    return dataclasses.replace(RESOLVED, checkpointing=checkpointing, kept_layers=kept)


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).train()


def runs_of_first_norm(model: Any) -> tuple[list[int], torch.Tensor]:
    """How often each layer's first norm ran in one step, and a gradient."""
    counts = [0] * len(model.model.layers)
    for place, layer in enumerate(model.model.layers):

        def count(*_: Any, place: int = place) -> None:
            counts[place] += 1

        layer.input_layernorm.register_forward_hook(count)
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counts, model.model.layers[0].mlp.up_proj.weight.grad


class Mixer(torch.nn.Module):
    """A layer of a hybrid, without attention."""

    def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_model_is_whole_if_every_layer_of_it_is_one_function(hybrid: bool) -> None:
    model = tiny().requires_grad_(True)
    if hybrid:
        model.model.layers[0] = Mixer()
    plan = dataclasses.replace(RESOLVED, tuning="full", rank=0, kernels="auto", precision="fp32")
    assert patch_kernels(model, plan, torch.device("cuda"), lambda _: None) is not hybrid
    assert len(ours(model)) == (3 if hybrid else 4)


def test_layers_that_compute_again_by_themselves_are_not_told_to() -> None:
    model = tiny()
    patch_model(model, only=["decoder_layer"], keeping=Keeping("inputs"))
    unpatch(model.model.layers[1])
    checkpoint_layers(model, resolved("full"), lambda _: None)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, True, False, False]


def test_kernels_that_inputs_turn_out_not_to_fit_are_told_of() -> None:
    model, told = tiny().requires_grad_(True), []
    patch_model(model, only=["decoder_layer"])
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    tell_fallbacks(model, told.append)
    assert told == []
    for layer in model.model.layers[:3]:
        layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    tell_fallbacks(model, told.append)
    what = "kernel decoder_layer: 3 modules run as they were after all"
    assert told == [Fallback(what, "something listens to its parts")]


@pytest.mark.parametrize(
    ("checkpointing", "kept", "runs"),
    [
        ("none", 0, [1, 1, 1, 1]),
        ("full", 0, [2, 2, 2, 2]),
        ("offload", 0, [2, 2, 2, 2]),
        ("selective", 1, [2, 2, 2, 1]),
        ("selective", 3, [2, 1, 1, 1]),
        ("selective", 9, [1, 1, 1, 1]),
    ],
)
def test_stock_layers_run_again_as_the_plan_says(checkpointing: str, kept: int, runs: list[int]) -> None:
    if checkpointing == "offload" and not torch.cuda.is_available():
        pytest.skip("what moves goes to pinned memory, which only a GPU has")
    _, expected = runs_of_first_norm(tiny())
    model, told = tiny(), []
    checkpoint_layers(model, resolved(checkpointing, kept), told.append)
    counts, gradient = runs_of_first_norm(model)
    assert counts == runs
    assert torch.equal(gradient, expected)
    stays = checkpointing == "offload" and not hasattr(model, "activation_checkpointing_enable")
    assert [event.what for event in told] == ["checkpointing: inputs of layers stay on the GPU"] * stays


def test_a_model_whose_layers_can_not_be_told_apart_says_so() -> None:
    told: list[Any] = []

    class Old(torch.nn.Module):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
            self.told = gradient_checkpointing_kwargs

    model = Old()
    checkpoint_layers(model, resolved("selective", 2), told.append)
    assert model.told == {"use_reentrant": False}
    assert [event.what for event in told] == ["checkpointing: every layer is computed again"]
    checkpoint_layers(model, resolved("offload"), told.append)
    assert told[-1].what == "checkpointing: inputs of layers stay on the GPU"


def test_each_policy_in_the_words_of_the_kernels() -> None:
    assert keeping(resolved("none")) == Keeping("all-but-elementwise")
    assert keeping(resolved("full")) == Keeping("inputs")
    assert keeping(resolved("offload")) == Keeping("inputs+attention", parks=True)
    assert keeping(resolved("selective", 3)) == Keeping("inputs", whole=3)
